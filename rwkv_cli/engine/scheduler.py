"""One thread that owns the models and makes many answers at the same time, in a fair order.

Answers of a model share its passes. A long prompt is read in parts between the others' tokens. What needs passes of
its own gets one between two passes of the batch.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from rwkv_cli.engine.batch import Batch
from rwkv_cli.engine.completion import Completion
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.prefixes import ModelPrefixes, Prefixes
from rwkv_cli.engine.speculation import Speculation
from rwkv_cli.engine.work import Work
from rwkv_cli.errors import BusyError

_PART = 64
"""Rows of prompts in a pass that others wait for."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a scheduler takes on."""

    running: int = 16
    """Answers and vectors in the making at the same time."""
    waiting: int = 64
    """Answers and vectors that are in the making or wait for it."""


@dataclass
class Counts:
    """The work done since the beginning."""

    passes: int = 0
    seconds: float = 0.0
    """Time that passes took."""
    prompt_tokens: int = 0
    """Tokens of prompts that were read."""
    cached_tokens: int = 0
    """Tokens of prompts that were known."""
    tokens: int = 0
    """Tokens of answers."""
    cancelled: int = 0
    drafted: int = 0
    """Guesses at tokens that passes have read."""
    accepted: int = 0
    """Guesses that were right."""


@dataclass
class _Lane:
    """The work that goes on with one model."""

    model: LanguageModel
    batch: Batch
    speculation: Speculation | None
    prefixes: ModelPrefixes | None
    alone: deque[tuple[Work, Iterator[None]]] = field(default_factory=deque)
    """Work that needs passes of its own."""
    together: dict[Completion, Work] = field(default_factory=dict)
    """Work that is done in the batch."""

    def works(self) -> list[Work]:
        """All work that has begun."""
        return [*(work for work, _ in self.alone), *self.together.values()]


class Scheduler:
    """The thread, and what waits for it."""

    def __init__(
        self,
        limits: Limits,
        prefixes: Prefixes | None = None,
        speculation: Callable[[LanguageModel], Speculation | None] = lambda _: None,
    ) -> None:
        """`speculation` returns what guesses ahead for a model's answer that is alone, if anything does."""
        self._speculation = speculation
        self.limits, self.prefixes, self.counts = limits, prefixes, Counts()
        self._change = threading.Condition()
        self._waiting: deque[Work] = deque()
        self._lanes: dict[LanguageModel, _Lane] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="rwkv-scheduler", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Number of answers and vectors in the making."""
        return sum(len(lane.alone) + len(lane.together) for lane in list(self._lanes.values()))

    @property
    def waiting(self) -> int:
        """Number of answers and vectors that wait for their beginning."""
        return len(self._waiting)

    @property
    def closing(self) -> bool:
        """True once nothing new is taken on."""
        return self._closing

    def submit(self, works: Sequence[Work]) -> None:
        """Take on all of this work. Raises BusyError, and takes none of it, where there is too much already.

        Raises ValueError for more work than there ever may be.
        """
        if len(works) > self.limits.waiting:
            raise ValueError(f"this asks for {len(works)} answers at once, and {self.limits.waiting} is the most")
        with self._change:
            if self._closing:
                raise BusyError("the server is about to stop")
            if self.running + len(self._waiting) + len(works) > self.limits.waiting:
                raise BusyError(f"there are {self.limits.waiting} answers in the making already; try again later")
            self._waiting.extend(works)
            self._change.notify()

    def close(self, grace: float) -> None:
        """Take on nothing new, and end once all is done. What is not done after `grace` seconds is cancelled."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join(grace)
        with self._change:
            for work in [*self._waiting, *(work for lane in list(self._lanes.values()) for work in lane.works())]:
                work.cancelled = True
            self._change.notify()
        self._thread.join()

    def _run(self) -> None:
        """Make passes as long as there is work. This is the thread."""
        while True:
            with self._change:
                while not self._waiting and not self.running:
                    if self._closing:
                        break
                    self._change.wait()
                if self._closing and not self._waiting and not self.running:
                    break
            self._remove_cancelled()
            self._admit()
            start = time.perf_counter()
            for lane in list(self._lanes.values()):
                self._advance(lane)
            self.counts.seconds += time.perf_counter() - start
        if self.prefixes is not None:
            self.prefixes.close()

    def _admit(self) -> None:
        """Begin with what has waited longest, as far as there is room."""
        for work in list(self._waiting):
            if self.running >= self.limits.running:
                return
            self._attempt([work], partial(self._begin, work))

    def _begin(self, work: Work) -> None:
        """Begin with a piece of work, unless it has to wait."""
        lane = self._lane(work.model)
        if work.begin(lane.prefixes):
            with self._change:
                self._waiting.remove(work)
            lane.alone.append((work, work.alone()))

    def _lane(self, model: LanguageModel) -> _Lane:
        """Return the lane of a model."""
        if model not in self._lanes:
            known = None if self.prefixes is None else ModelPrefixes(self.prefixes, model)
            speculation = self._speculation(model)
            self._lanes[model] = _Lane(model, Batch(model, speculation), speculation, known)
        return self._lanes[model]

    def _advance(self, lane: _Lane) -> None:
        """Make a pass of a model's batch, and one of the work that stands alone."""
        if lane.together:
            self._attempt(list(lane.together.values()), partial(self._pass, lane))
        for _ in range(len(lane.alone)):
            work, parts = lane.alone.popleft()
            before = len(lane.together)
            self._attempt([work], partial(self._part, lane, work, parts))
            if len(lane.together) == before:
                break

    def _pass(self, lane: _Lane) -> None:
        """Make a pass of a batch."""
        before = {completion: completion.result.prompt_tokens for completion in lane.together}
        tokens = {completion: completion.result.tokens for completion in lane.together}
        ended = lane.batch.step(_PART if len(lane.together) > 1 else None)
        self.counts.passes += 1
        if lane.speculation is not None:
            guesses = lane.speculation.count()
            self.counts.passes -= guesses.right  # the pass before had read this token
            self.counts.drafted += guesses.read
            self.counts.accepted += guesses.right
        for completion, work in list(lane.together.items()):
            self.counts.prompt_tokens += completion.result.prompt_tokens - before[completion]
            self.counts.tokens += completion.result.tokens - tokens[completion]
            if completion in ended:
                del lane.together[completion]
                self._end(work)
            else:
                work.on_change()

    def _part(self, lane: _Lane, work: Work, parts: Iterator[None]) -> None:
        """Do a part of what stands alone, and pass on what is left for the batch."""
        for _ in parts:
            lane.alone.append((work, parts))
            return
        completion = work.goes_on()
        if completion is None:
            self._end(work)
            return
        self.counts.cached_tokens += work.cached
        lane.together[completion] = work
        try:
            lane.batch.add(completion)
            work.on_change()  # where the whole prompt was known, its first token is there
        except StopIteration:  # it ended with its first token, or was cancelled
            del lane.together[completion]
            self._end(work)
        self.counts.tokens += completion.result.tokens

    def _remove_cancelled(self) -> None:
        """End what nobody waits for any more."""
        with self._change:
            gone = [work for work in self._waiting if work.cancelled]
            for work in gone:
                self._waiting.remove(work)
        for lane in self._lanes.values():
            gone += [work for work, _ in lane.alone if work.cancelled]
            lane.alone = deque(pair for pair in lane.alone if not pair[0].cancelled)
            for completion, work in list(lane.together.items()):
                if work.cancelled:
                    gone.append(work)
                    del lane.together[completion]
                    lane.batch.remove(completion)
        for work in gone:
            self._end(work)

    def _attempt(self, works: list[Work], do: Callable[[], object]) -> None:
        """Do something for some work. An error ends that work and nothing else."""
        try:
            do()
        except Exception as error:  # whatever went wrong, the others go on
            for work in works:
                work.error = error
                work.cancelled = True
                self._drop(work)
                self._end(work)

    def _drop(self, work: Work) -> None:
        """Remove a piece of work wherever it is."""
        with self._change:
            if work in self._waiting:
                self._waiting.remove(work)
        for lane in self._lanes.values():
            lane.alone = deque(pair for pair in lane.alone if pair[0] is not work)
            for completion in [completion for completion, other in lane.together.items() if other is work]:
                del lane.together[completion]
                lane.batch.remove(completion)

    def _end(self, work: Work) -> None:
        """Tell that a piece of work has ended."""
        self.counts.cancelled += work.cancelled and work.error is None
        work.done = True
        work.on_change()
