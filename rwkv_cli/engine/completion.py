"""The loop that makes text with a model."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.model import LanguageModel, check_finite
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.engine.speculation import Speculation
from rwkv_cli.engine.tokenizer import Tokenizer
from rwkv_cli.errors import TokenizerError
from rwkv_cli.models import State
from rwkv_cli.models.base import chunks

Logits = NDArray[np.float32]

Steps = Generator[Sequence[int], Logits, None]
"""A text in the making: yields the ids that the state has to read, and is sent the logits [V] after them."""

OnRead = Callable[[int], object]
"""A function that is called several times a second with the number of prompt tokens read so far."""


def new_sampler(model: LanguageModel, settings: Sampling, seed: int | None) -> Sampler:
    """Make a sampler that does not count blanks and digits (rwkv package, utils.py, `generate`).

    A seed of None is replaced by a random one.
    """
    return Sampler(settings, random_seed() if seed is None else seed, uncounted(model.text_tokenizer))


def random_seed() -> int:
    """Return a seed that nobody has chosen."""
    return int(np.random.default_rng().integers(1 << 31))


def uncounted(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that are blanks and digits, whose occurrences samplers do not count."""
    blank = " \t0123456789"
    single = [_spelled(tokenizer, blank[a:b]) for a in range(len(blank)) for b in range(a + 1, len(blank) + 1)]
    return frozenset(ids[0] for ids in single if len(ids) == 1)


def _spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, none if the vocabulary cannot spell it."""
    try:
        return tokenizer.encode(text)
    except TokenizerError:
        return []


@dataclass(frozen=True)
class Request:
    """One text that is asked for: the prompt to go on from, and where the text ends."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_tokens: int
    stops: Sequence[str] = ()
    """Texts that end the text before them."""
    ignore_eos: bool = False
    """True if the text goes on where the model would end it."""


@dataclass
class Result:
    """The text made so far, and how that went."""

    pieces: list[str] = field(default_factory=list)
    """The text in pieces, as they became certain. A long text is never copied while it is made."""
    unread: str = ""
    """The end of `text` that the state has not read."""
    unread_ids: Sequence[int] = ()
    """The ids of `unread` as they were sampled, or encoded anew where a stop text has cut a token apart."""
    tokens: int = 0
    """Number of tokens sampled, the one that ended the text included."""
    ids: list[int] = field(default_factory=list)
    """The tokens sampled, without an end token."""
    read: int = 0
    """How many of `ids` the state has read."""
    seconds: float = 0.0
    prompt_tokens: int = 0
    """Number of prompt tokens read."""
    prompt_seconds: float = 0.0
    drafted: int = 0
    """Number of guesses at tokens that the model has read."""
    accepted: int = 0
    """Number of those that were right."""
    stop: str = "interrupted"
    """The reason for the end: eos, stop, length or interrupted."""

    @property
    def text(self) -> str:
        """The text made so far. Joining it takes longer the longer it is."""
        return "".join(self.pieces)


class _CancelledError(Exception):
    """A completion was cancelled while a part of its prompt was read. The state has read nothing of that part."""


class Completion:
    """One text in the making. `stream` makes it, and `result` is right even when the text is cut short.

    Afterwards `state` has read the prompt and all of the text but its unread end. It has read nothing of a stop text.
    """

    def __init__(
        self,
        model: LanguageModel,
        state: State,
        sampler: Sampler,
        request: Request,
        *,
        speculation: Speculation | None = None,
    ) -> None:
        """`state` is the state before the prompt. It is changed in place. `speculation` is one of this model."""
        self.model, self.state, self.sampler, self.request = model, state, sampler, request
        self._speculation = speculation
        self.result = Result()
        self.cancelled = False
        self._watch: Callable[[int], object] | None = None
        """A function that is told how far the part of a prompt is read."""

    def cancel(self) -> None:
        """End the text after the token in work. A signal handler may call this."""
        self.cancelled = True

    def read(self, end: int, on_read: OnRead) -> None:
        """Read the prompt's tokens before `end`, so that the state there can be kept. `stream` reads the rest."""
        for _ in self._feed(self._read_prompt(end, on_read)):
            pass

    def stream(self, on_read: OnRead | None = None) -> Iterator[str]:
        """Read the prompt, then yield the text as it comes.

        Characters that may begin a stop text are held back until they are certain. A stop text is never yielded.
        """
        shown = 0
        for _ in self._feed(self.steps(on_read)):
            if len(self.result.pieces) > shown:
                yield "".join(self.result.pieces[shown:])
                shown = len(self.result.pieces)

    def _feed(self, steps: Generator[Sequence[int], Logits, object]) -> Iterator[None]:
        """Have the state read the ids that `steps` yields. Yields after each step."""
        ids = next(steps, None)
        try:
            while ids is not None:
                try:
                    try:
                        logits = self._advance(ids)
                    except _CancelledError as cancelled:
                        ids = steps.throw(cancelled)
                    else:
                        ids = steps.send(logits)
                except StopIteration:
                    ids = None
                yield
        finally:
            if self._speculation is not None:
                self.state = self._speculation.settled(self.state)
                count = self._speculation.count()
                self.result.drafted += count.read
                self.result.accepted += count.right

    def _advance(self, ids: Sequence[int]) -> Logits:
        """Have the state read some ids."""
        if self._speculation is None:
            return self.model.advance(ids, self.state, watch=self._watch)
        logits, self.state = self._speculation.advance(ids, self.state, self.sampler, self._watch)
        return logits

    def steps(self, on_read: OnRead | None = None) -> Steps:
        """Make the text for a caller that advances the state. After each step the result holds the certain text."""
        logits = yield from self._read_prompt(len(self.request.prompt), on_read)
        if logits is None:
            assert self.cancelled, "the prompt is empty"
            return
        yield from self._write(logits)

    def _write(self, logits: Logits) -> Steps:
        """Make the text from the logits after the prompt."""
        start = time.perf_counter()
        try:
            yield from self._generate(logits)
        finally:
            self.result.seconds = time.perf_counter() - start

    def _read_prompt(self, end: int, on_read: OnRead | None) -> Generator[Sequence[int], Logits, Logits | None]:
        """Read on in the prompt up to `end`. Returns the logits there, or None if the completion was cancelled."""
        result, prompt = self.result, self.request.prompt[self.result.prompt_tokens : end]
        start = time.perf_counter() - result.prompt_seconds
        logits = None

        def watch(read: int) -> None:
            if self.cancelled:
                raise _CancelledError
            if on_read is not None:
                on_read(result.prompt_tokens + read)

        self._watch = watch
        try:
            for part in chunks(len(prompt), self.model.backend.chunk):
                if self.cancelled:
                    return None
                logits = yield prompt[part]
                result.prompt_tokens += len(prompt[part])
                result.prompt_seconds = time.perf_counter() - start
        except _CancelledError:
            return None
        finally:
            self._watch = None
        return logits

    def _generate(self, logits: Logits) -> Steps:
        """Sample tokens until the text ends, from the logits after the prompt."""
        request, result = self.request, self.result
        stream = self.model.text_tokenizer.stream(request.prompt)
        # Tokens that the state has not read yet, since those after them are certain without logits.
        unread = list[int]()
        ahead = list[int]()
        # This is the state before the first token that may belong to a stop text or to an unfinished character.
        clean: State | None = None
        # The text and the ids after that state. No stop text can begin before them, or it would have ended the text.
        made, ids = "", list[int]()
        certain, end = 0, None
        while True:
            if not unread:
                if clean is None:
                    made, certain = "", 0
                    ids.clear()
                before, read, torn = len(made), len(ids), stream.unfinished  # as far as the state has read
            if self.cancelled:
                break
            token = ahead.pop(0) if ahead else self._sample(logits)
            result.tokens += 1
            if token in self.model.ends and not request.ignore_eos:
                result.stop = "eos"
                break
            ids.append(token)
            result.ids.append(token)
            made += stream.push(token)
            end = first_stop(made, request.stops)
            if end is not None:
                result.stop = "stop"
                break
            if result.tokens == request.max_tokens:
                result.stop = "length"
                break
            ahead = ahead or self.sampler.ahead()
            held = held_back(made, request.stops)
            if held or stream.unfinished:
                clean = clean or self.state.clone()
            elif not ahead:
                clean = None
            if len(made) - held > certain:
                result.pieces.append(made[certain : len(made) - held])
                certain = len(made) - held
            unread.append(token)
            if not ahead:
                logits = yield unread
                unread = []
        if end is None:
            made += stream.flush()
            end = len(made)
        if clean is not None and (torn or result.stop == "stop"):
            self.state, before, read = clean, 0, 0
        if end > certain:
            result.pieces.append(made[certain:end])
        result.read = len(result.ids) - len(ids) + read
        result.unread = made[before:end]
        cut = result.stop == "stop"
        result.unread_ids = _spelled(self.model.text_tokenizer, result.unread) if cut else ids[read:]

    def _sample(self, logits: Logits) -> int:
        """Sample a token, after a check of the logits."""
        check_finite(self.model, logits)
        if self.request.ignore_eos:
            logits = logits.copy()
            logits[list(self.model.ends)] = -1e30
        return self.sampler.sample(logits)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first of the stop texts begins, if one is there."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end may still turn out to begin a stop text."""
    longest = 0
    for stop in stops:
        for n in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:n]):
                longest = n
                break
    return longest
