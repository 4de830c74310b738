"""A model with its tokenizer, and the loop that makes text with it."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.jit import cache_folder
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

Steps = Generator[Sequence[int], NDArray[np.float32], None]
"""Yields ids to be read, and is sent the logits [V] after them."""


class LanguageModel(Model):
    """A model with its tokenizer (None if conversion found none) and the name of its chat template."""

    tokenizer: Tokenizer | None

    def __init__(
        self, checkpoint: Checkpoint, device: str = "cpu", threads: int | None = None,
        on_load: Callable[[int], object] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(checkpoint, device, threads, on_load)
        self.path = checkpoint.path
        self.tokenizer = read_tokenizer(checkpoint)
        if self.tokenizer is not None and self.tokenizer.size > self.config.vocab:
            raise FormatError(f"{self.path}: its tokenizer has more tokens than the model; convert it again")
        self.template: str = checkpoint.metadata("template", str)
        self.quantization: str = checkpoint.metadata("quantization", str)

    @classmethod
    def load(
        cls, path: Path, device: str = "cpu", threads: int | None = None, on_load: Callable[[int], object] | None = None
    ) -> "LanguageModel":
        """Map a converted file, and copy its weights if the device is not the CPU."""
        return cls(Checkpoint(path), device, threads, on_load)

    def compile_kernels(self) -> None:
        """Compile what this kind of model runs on, if that was never done on this machine."""
        device = self.ops.__name__.rpartition(".")[2]
        done = cache_folder() / f"compiled-{device}-{self.config.version}-{self.quantization}"
        if not done.exists():
            state = self.new_state()
            self.advance([0], state)
            self.losses([0, 0], [0, 0], state)
            done.touch()

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


class Batch:
    """Completions of one model that share its forward passes. Each makes the text that it would make alone."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._running: list[tuple[Completion, Steps, Sequence[int]]] = []
        self._state: State | None = None
        """Of all that run, in their order; None when others run than before."""

    def add(self, completion: Completion, prompt: Sequence[int]) -> None:
        """Take in one that has not begun. Its state becomes a view into the batch's: clone it to keep it."""
        steps = completion.steps(prompt)
        self._running.append((completion, steps, next(steps)))
        self._state = None

    def step(self) -> list[Completion]:
        """One pass: each reads its next token, or up to CHUNK of its prompt, and picks another. Those that ended."""
        if self._state is None:
            self._state = State.stack([completion.state for completion, _, _ in self._running])
        logits = self.model.advance_batch([ids for _, _, ids in self._running], self._state)
        # only now: the device may have taken the state in, and what was a row of it before would stay behind
        for b, (completion, _, _) in enumerate(self._running):
            completion.state = self._state.row(b)
        running, ended = [], []
        for (completion, steps, _), row in zip(self._running, logits, strict=True):
            try:
                running.append((completion, steps, steps.send(row)))
            except StopIteration:
                ended.append(completion)
        self._running = running
        if ended:
            self._state = None
        return ended


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
