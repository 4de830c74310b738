"""The likelihood of given texts after others, several in one forward pass."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.model import LanguageModel, check_finite, obey
from rwkv_cli.engine.tokenizer import END_OF_TEXT
from rwkv_cli.models import State

Watch = Callable[[int], object]
"""A function that a model calls several times a second while it reads. It may raise, as Ctrl-C does."""

BATCH = 16
"""Sequences that are read together."""


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a text's tokens, each after all before it."""

    nll: float
    """The sum of −log p over the tokens, in nats."""
    tokens: int
    greedy: bool
    """True if each token is the likeliest one. The model writes this text at temperature 0."""


@dataclass(frozen=True)
class Question:
    """A context of at least one token, and texts that may follow it, each of at least one token."""

    context: Sequence[int]
    endings: Sequence[Sequence[int]]


def start_of_text(model: LanguageModel) -> int:
    """The token before a text, as the reference's tests of models choose it (ChatRWKV v2/benchmark.py, RWKV-LM demos).

    It is 0, which ends a text. RWKV-4 with the vocabulary of the Pile was not trained so, and gets a line break.
    """
    tokenizer = model.text_tokenizer
    if model.config.version == "4" and tokenizer.kind == "json":
        line_break = tokenizer.encode("\n")
        return line_break[0] if len(line_break) == 1 else END_OF_TEXT
    return END_OF_TEXT


def answer_questions(
    model: LanguageModel, questions: Sequence[Question], watch: Watch = obey, size: int = BATCH
) -> Iterator[list[list[Likelihood]]]:
    """Yield the likelihoods of all endings of each question, for `size` questions at a time."""
    for at in range(0, len(questions), size):
        some = questions[at : at + size]
        state = State.stack([model.new_state()] * len(some))
        logits = model.advance_batch([question.context for question in some], state, watch=watch)
        yield likelihoods(model, logits, state, [question.endings for question in some])


def likelihoods(
    model: LanguageModel, logits: NDArray[np.float32], state: State, endings: Sequence[Sequence[Sequence[int]]]
) -> list[list[Likelihood]]:
    """Return the likelihoods of `endings[b]` after sequence b of a batch, which is left as it is.

    `logits` [B, V] are those after each sequence.
    """
    check_finite(model, logits)
    flat = [(b, ending) for b, some in enumerate(endings) for ending in some]
    out: list[list[Likelihood]] = [[] for _ in endings]
    for part in _parts(flat, model.backend.chunk):
        longer = [(b, ending) for b, ending in part if len(ending) > 1]
        rows: NDArray[np.float32] = logits[:0]
        if longer:
            copies = State.stack([state.row(b) for b, _ in longer])
            rows = model.advance_batch([ending[:-1] for _, ending in longer], copies, all_logits=True, watch=obey)
            check_finite(model, rows)
        at = 0
        for b, ending in part:
            end = at + len(ending) - 1
            out[b].append(_likelihood([logits[b], *rows[at:end]], ending))
            at = end
    return out


def _parts(flat: Sequence[tuple[int, Sequence[int]]], most: int) -> Iterator[list[tuple[int, Sequence[int]]]]:
    """Yield endings that are read together: up to `BATCH` of them with up to `most` tokens, or one that has more."""
    part: list[tuple[int, Sequence[int]]] = []
    rows = 0
    for b, ending in flat:
        if part and (len(part) == BATCH or rows + len(ending) > most):
            yield part
            part, rows = [], 0
        part.append((b, ending))
        rows += len(ending)
    if part:
        yield part


def _likelihood(rows: Sequence[NDArray[np.float32]], ending: Sequence[int]) -> Likelihood:
    """Return the likelihood of an ending, from the logits [V] before each of its tokens."""
    nll, greedy = 0.0, True
    for row, token in zip(rows, ending, strict=True):
        scores = row.astype(np.float64)
        most = scores.max()
        nll += float(most - scores[token] + np.log(np.exp(scores - most).sum()))
        greedy &= int(np.argmax(row)) == token
    return Likelihood(nll, len(ending), greedy)
