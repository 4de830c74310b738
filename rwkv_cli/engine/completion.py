"""The loop that makes text with a model."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.model import LanguageModel, check_finite
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.engine.tokenizer import END_OF_TEXT
from rwkv_cli.models import State
from rwkv_cli.models.base import CHUNK

Steps = Generator[Sequence[int], NDArray[np.float32], None]
"""Yields ids to be read, and is sent the logits [V] after them."""


def new_sampler(model: LanguageModel, settings: Sampling, seed: int | None) -> Sampler:
    """A sampler that does not count blanks and digits (rwkv package, utils.py, `generate`); seed None: random."""
    tokenizer, blank = model.text_tokenizer, " \t0123456789"
    single = [tokenizer.encode(blank[a:b]) for a in range(len(blank)) for b in range(a + 1, len(blank) + 1)]
    if seed is None:
        seed = int(np.random.default_rng().integers(1 << 31))
    return Sampler(settings, seed, frozenset(ids[0] for ids in single if len(ids) == 1))


@dataclass(eq=False)
class Completion:
    """One text being made. Iterate `run` for its pieces; the fields tell how it went, also when it is cut short.

    Afterwards `state` has seen the prompt and all of `text` but its end `unread`, and nothing of a stop text.
    """

    model: LanguageModel
    state: State
    sampler: Sampler
    max_tokens: int
    stops: Sequence[str] = ()
    ignore_eos: bool = False
    cancelled: bool = False
    """Set from elsewhere (a signal handler) to end the text after the token in work."""
    on_read: Callable[[int], object] | None = None
    """Called with the number of the prompt's tokens that `state` has read so far, each time that it has read some."""
    last_alone: bool = False
    """Read the prompt's last token by itself, so that `on_read` meets the state before it."""
    text: str = ""
    unread: str = ""
    unread_ids: Sequence[int] = ()
    """The ids of `unread` as they were picked, unless a stop text has cut one apart."""
    tokens: int = 0
    prompt_tokens: int = 0
    """How many of the prompt's tokens were read."""
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    stop: str = "interrupted"
    """Why it ended: eos, stop, length or interrupted."""

    def run(self, prompt: Sequence[int]) -> Iterator[str]:
        """Feed `prompt` (not empty), then yield the text as it comes. What may be part of a stop text is held back
        until it is certain; the stop text itself is never yielded."""
        steps, shown = self.steps(prompt), 0
        ids = next(steps, None)
        while ids is not None:
            try:
                ids = steps.send(self.model.advance(ids, self.state))
            except StopIteration:
                ids = None
            if len(self.text) > shown:
                yield self.text[shown:]
                shown = len(self.text)

    def steps(self, prompt: Sequence[int]) -> Steps:
        """`run` for a caller that has `state` read what this yields. After each step `text` holds what is certain."""
        start = time.perf_counter()
        logits: NDArray[np.float32] | None = None
        edges = sorted({*range(0, len(prompt), CHUNK), len(prompt) - self.last_alone, len(prompt)})
        for at, end in pairwise(edges):
            if self.cancelled:
                return
            logits = yield prompt[at:end]
            self.prompt_tokens, self.prompt_seconds = end, time.perf_counter() - start
            if self.on_read is not None:
                self.on_read(end)
        assert logits is not None, "the prompt is empty"
        start = time.perf_counter()
        try:
            yield from self._generate(logits)
        finally:
            self.seconds = time.perf_counter() - start

    def _generate(self, logits: NDArray[np.float32]) -> Steps:
        stream = self.model.text_tokenizer.stream()
        made, ids = "", list[int]()
        # before the first token that may belong to a stop text or to an unfinished character
        clean: tuple[State, int, int] | None = None
        end: int | None = None
        while True:
            before, read, torn = len(made), len(ids), stream.unfinished  # what the state has read
            if self.cancelled:
                break
            token = self._pick(logits)
            self.tokens += 1
            if token == END_OF_TEXT and not self.ignore_eos:
                self.stop = "eos"
                break
            ids.append(token)
            made += stream.push(token)
            end = first_stop(made, self.stops)
            if end is not None:
                self.stop = "stop"
                break
            if self.tokens == self.max_tokens:
                self.stop = "length"
                break
            held = held_back(made, self.stops)
            if not held and not stream.unfinished:
                clean = None
            elif clean is None:
                clean = self.state.clone(), before, read
            self.text = made[: len(made) - held]
            logits = yield [token]
        if end is None:
            made += stream.flush()
            end = len(made)
        if clean is not None and (torn or self.stop == "stop"):
            self.state, before, read = clean
        self.text, self.unread = made[:end], made[before:end]
        self.unread_ids = self.model.text_tokenizer.encode(self.unread) if self.stop == "stop" else ids[read:]

    def _pick(self, logits: NDArray[np.float32]) -> int:
        check_finite(self.model, logits)
        if self.ignore_eos:
            logits = logits.copy()
            logits[END_OF_TEXT] = -1e30
        return self.sampler.pick(logits)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop texts begins, if one is there."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may yet turn out to begin a stop text."""
    longest = 0
    for stop in stops:
        for n in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:n]):
                longest = n
                break
    return longest
