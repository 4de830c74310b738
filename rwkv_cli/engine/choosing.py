"""The choice of tokens for a request: biases, a grammar, and how likely each token was."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.sampling import Sampler


class Grammar(Protocol):
    """A language that a text has to belong to. It follows the text token by token."""

    def allowed(self) -> NDArray[np.bool_] | None:
        """Return for each token [V] whether it may come next, or None where any may."""

    def take(self, token: int) -> list[int]:
        """Follow a token. Returns those that must come after it, which it has followed too."""


class Score(NamedTuple):
    """How likely a token was, and the likeliest ones there, as natural logarithms."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Chooser(Sampler):
    """A sampler with what a request may ask for."""

    _: KW_ONLY
    bias: Mapping[int, float] = field(default_factory=dict)
    """Numbers that are added to the logits of tokens."""
    top: int | None = None
    """How many of the likeliest tokens to keep with each score, or None to keep no scores."""
    grammar: Grammar | None = None
    scores: list[Score] = field(default_factory=list, init=False)
    """The scores of all tokens chosen, by the model's own logits."""
    _forced: list[int] = field(default_factory=list, init=False, repr=False)
    """Tokens that the grammar demands next."""

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Choose the next token from logits [V], or take the one that the grammar demands."""
        if self._forced:
            token = self._forced.pop(0)
            self._count(token, len(logits))
        else:
            token = super().sample(self._changed(logits))
            if self.grammar is not None:
                self._forced = self.grammar.take(token)
        if self.top is not None:
            (score,) = scored(logits[None], [token], self.top)
            self.scores.append(score)
        return token

    def copy(self) -> "Chooser":
        """Return a sampler that will choose the same. It keeps no scores, which would be copied with each guess."""
        bare = copy.copy(self)
        bare.top, bare.scores = None, []
        return copy.deepcopy(bare)

    def ahead(self) -> list[int]:
        """Return what the grammar demands next. With scores nothing is ahead, since each token needs its logits."""
        if self.top is not None:
            return []
        tokens, self._forced = self._forced, []
        for token in tokens:
            self._count(token, len(self._seen))
        return tokens

    def _changed(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits with the bias, and without what the grammar forbids."""
        if self.bias:
            logits = logits.copy()
            for token, value in self.bias.items():
                logits[token] += value
        allowed = None if self.grammar is None else self.grammar.allowed()
        return logits if allowed is None else np.where(allowed, logits, np.float32(-np.inf))


def scored(logits: NDArray[np.float32], tokens: Sequence[int], top: int) -> list[Score]:
    """Score `tokens` [T] by logits [T, V]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    scores = []
    for row, token in zip(wide, tokens, strict=True):
        count = min(top, len(row))
        some = np.argpartition(-row, count - 1)[:count] if count else np.zeros(0, np.int64)
        best = some[np.argsort(-row[some], kind="stable")]
        scores.append(Score(int(token), float(row[token]), [(int(i), float(row[i])) for i in best]))
    return scores
