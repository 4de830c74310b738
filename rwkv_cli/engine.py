"""A model with its tokenizer, and the loop that makes text with it."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.models import Model, State
from rwkv_cli.models.base import CHUNK
from rwkv_cli.quant import Checkpoint, FormatError
from rwkv_cli.sampling import Sampler, Sampling
from rwkv_cli.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    JsonTokenizer,
    Tokenizer,
    TokenizerError,
    WorldTokenizer,
)


class LanguageModel(Model):
    """A model with its tokenizer (None if conversion found none) and the name of its chat template."""

    tokenizer: Tokenizer | None

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", threads: int | None = None) -> None:
        super().__init__(checkpoint, device, threads)
        self.path = checkpoint.path
        self.tokenizer = read_tokenizer(checkpoint)
        if self.tokenizer is not None and self.tokenizer.size > self.config.vocab:
            raise FormatError(f"{self.path}: its tokenizer has more tokens than the model; convert it again")
        self.template: str = checkpoint.metadata("template", str)

    @classmethod
    def load(cls, path: Path, device: str = "cpu", threads: int | None = None) -> "LanguageModel":
        """Map a converted file."""
        return cls(Checkpoint(path), device, threads)

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises TokenizerError if there is none."""
        if self.tokenizer is None:
            raise TokenizerError(f"{self.path}: has no tokenizer")
        return self.tokenizer


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer inside a converted file."""
    kind = checkpoint.metadata("tokenizer", str)
    try:
        if kind == "none":
            return None
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "world":
            return WorldTokenizer.from_arrays(
                checkpoint.array("tokenizer.bytes"), checkpoint.array("tokenizer.lengths")
            )
        if kind == "json":
            return JsonTokenizer(checkpoint.array("tokenizer.json").tobytes(), "tokenizer.json")
    except TokenizerError as error:
        raise FormatError(f"{checkpoint.path}: its tokenizer is damaged ({error}); convert the model again") from None
    raise FormatError(f"{checkpoint.path}: has a tokenizer of unknown kind {kind!r}; upgrade rwkv-cli")


def new_sampler(model: LanguageModel, settings: Sampling, seed: int | None) -> Sampler:
    """A sampler that does not count blanks and digits (rwkv package, utils.py, `generate`); seed None: random."""
    tokenizer, blank = model.text_tokenizer, " \t0123456789"
    single = [tokenizer.encode(blank[a:b]) for a in range(len(blank)) for b in range(a + 1, len(blank) + 1)]
    if seed is None:
        seed = int(np.random.default_rng().integers(1 << 31))
    return Sampler(settings, seed, frozenset(ids[0] for ids in single if len(ids) == 1))


def check_finite(model: LanguageModel, values: NDArray[np.floating[Any]]) -> None:
    """Raises FormatError where a model's output, or what was computed from it, is not finite."""
    if not np.isfinite(values).all():
        raise FormatError(f"{model.path}: the model's output is not finite; convert it again from a sound file")


@dataclass
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
    text: str = ""
    unread: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    stop: str = "interrupted"
    """Why it ended: eos, stop, length or interrupted."""

    def run(self, prompt: Sequence[int]) -> Iterator[str]:
        """Feed `prompt` (not empty), then yield the text as it comes. What may be part of a stop text is held back
        until it is certain; the stop text itself is never yielded."""
        start = time.perf_counter()
        logits: NDArray[np.float32] | None = None
        for at in range(0, len(prompt), CHUNK):
            if self.cancelled:
                return
            logits = self.model.advance(prompt[at : at + CHUNK], self.state)
        self.prompt_tokens, self.prompt_seconds = len(prompt), time.perf_counter() - start
        assert logits is not None, "the prompt is empty"
        start = time.perf_counter()
        try:
            yield from self._generate(logits)
        finally:
            self.seconds = time.perf_counter() - start

    def _generate(self, logits: NDArray[np.float32]) -> Iterator[str]:
        stream = self.model.text_tokenizer.stream()
        made = ""
        # before the first token that may belong to a stop text or to an unfinished character
        clean: tuple[State, int] | None = None
        end: int | None = None
        while True:
            before, torn = len(made), stream.unfinished  # what the state has read
            if self.cancelled:
                break
            token = self._pick(logits)
            self.tokens += 1
            if token == END_OF_TEXT and not self.ignore_eos:
                self.stop = "eos"
                break
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
                clean = self.state.clone(), before
            piece, self.text = made[len(self.text) : len(made) - held], made[: len(made) - held]
            if piece:
                yield piece
            logits = self.model.advance([token], self.state)
        if end is None:
            made += stream.flush()
            end = len(made)
        if clean is not None and (torn or self.stop == "stop"):
            self.state, before = clean
        piece, self.text, self.unread = made[len(self.text) : end], made[:end], made[before:end]
        if piece:
            yield piece

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
