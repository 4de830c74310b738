"""Executes kernels: all threads of some blocks at a time, those that are least far first."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ptx.errors import KernelError
from ptx.launch import Lanes, Launch, Memory
from ptx.parse import Piece
from ptx.races import THREADS, GlobalRaces
from ptx.spaces import round_up
from ptx.translate import Translated
from ptx.warps import LANES

_THREADS = 4096
"""Threads that are executed at a time, unless a block has more."""


class Active(NamedTuple):
    """The threads that execute a piece."""

    mask: Any
    lanes: Any
    all: bool
    """True if no other thread has anything left to do."""

    def only(self, chosen: Any) -> "Active":
        mask = self.mask & chosen
        return Active(mask, np.flatnonzero(mask), False)


def execute(launch: Launch, translated: Translated) -> None:
    """Execute a launch, and check that nothing is wrong. Raises KernelError."""
    log = GlobalRaces(launch.memory, translated.grain("global"))
    blocks = int(np.prod(launch.grid))
    at_a_time = max(1, _THREADS // round_up(int(np.prod(launch.threads)), LANES))
    waited = False
    for first in range(0, blocks, at_a_time):
        frame = Frame(launch, translated, np.arange(first, min(first + at_a_time, blocks)), log)
        with np.errstate(all="ignore"):
            frame.execute()
        waited |= bool(frame.memory.waited.any())
    if launch.run is not None and not waited:
        raise KernelError(
            f"griddepcontrol: {launch.name}: no thread waits for the launches before, so the next one does not"
        )
    if (race := log.found()) is not None:
        one, other = (f"thread {each % THREADS} of block {each // THREADS}" for each in race.threads)
        met = f"{race.one.instruction} by {one} and {race.other.instruction} by {other} meet"
        raise KernelError(f"racecheck: {launch.name}: {met} at {launch.memory.place(race.address)}")


class Frame:
    """Some blocks of a launch while they are executed."""

    def __init__(self, launch: Launch, translated: Translated, blocks: Any, log: GlobalRaces) -> None:
        self.launch, self._translated, self._blocks = launch, translated, len(blocks)
        count = int(np.prod(launch.threads))
        self._width = round_up(count, LANES)
        n = self._blocks * self._width
        thread = np.tile(np.arange(self._width, dtype=np.int32), self._blocks)
        index = np.repeat(np.arange(self._blocks), self._width)
        self.exists = thread < count
        self.alive = self.exists.copy()
        self.lane = np.arange(n) % LANES
        lanes = Lanes(index, blocks[index], thread + 1)
        self.memory = Memory(launch, lanes, log, translated.grain("shared"))
        self.special = _places("tid", thread, launch.threads) | _places("ctaid", lanes.of_grid, launch.grid)
        for name, shape in (("ntid", launch.threads), ("nctaid", launch.grid)):
            self.special |= {
                f"%{name}.{axis}": np.full(n, size, np.int32) for axis, size in zip("xyz", shape, strict=True)
            }
        self.special["%laneid"] = self.lane.astype(np.int32)
        given = zip(launch.code.parameters, launch.arguments, strict=True)
        self.parameters = {name: np.full(n, value) for name, value in given}
        self.registers, self.constants = translated.registers(n), translated.constants(n)
        self._waiting: dict[int, Any] = {}
        self._at_barrier: dict[int, Any] = {}

    def execute(self) -> None:
        """Execute all threads to their end."""
        self._waiting[0] = self.alive.copy()
        while self._waiting:
            at, active = self._next()
            piece, run = self.launch.code.pieces[at], self._translated.pieces[at]
            (run.whole if active.all else run.part)(self, self.registers, self.constants, active)
            self._leave(at, piece, active)
        if self._at_barrier:
            self._report_waiting()
        self.memory.end()

    def _next(self) -> tuple[int, Active]:
        """The threads that go on: those that are least far and, where a warp must be together, are so."""
        for at in sorted(self._waiting):
            mask = self._waiting[at]
            if self.launch.code.pieces[at].together:
                missing = (self.exists & ~mask).reshape(-1, LANES).any(1)
                mask = mask & ~np.repeat(missing, LANES)
                if not mask.any():
                    continue
            rest = self._waiting.pop(at) & ~mask
            if rest.any():
                self._waiting[at] = rest
            return at, Active(mask, np.flatnonzero(mask), bool((mask == self.alive).all()))
        self._report_waiting()
        raise AssertionError("threads wait for nothing")

    def _leave(self, at: int, piece: Piece, active: Active) -> None:
        """Send threads to where they go after a piece."""
        labels, branch = self.launch.code.labels, piece.branch
        if piece.barrier is not None:
            self._arrive(at, active)
        elif branch is None:
            self._go(at + 1, active.mask)
        else:
            taken = active.mask
            if branch.guard:
                taken = taken & (self.registers[self._translated.index[branch.guard]] == branch.wanted)
                self._go(at + 1, active.mask & ~taken)
            if branch.parts[0] == "bra":
                (target,) = branch.operands
                self._go(labels[str(target)], taken)
            else:
                self.alive &= ~taken
                for barrier in tuple(self._at_barrier):
                    self._release(barrier)

    def _go(self, to: int, mask: Any) -> None:
        if mask.any():
            self._waiting[to] = self._waiting[to] | mask if to in self._waiting else mask

    def _arrive(self, at: int, active: Active) -> None:
        self._at_barrier[at] = self._at_barrier.get(at, np.zeros_like(self.alive)) | active.mask
        self._release(at)

    def _release(self, at: int) -> None:
        """Let those blocks go on whose threads are all at the barrier behind a piece, or have ended."""
        there = self._at_barrier[at]
        met = (there == self.alive).reshape(self._blocks, -1).all(1) & there.reshape(self._blocks, -1).any(1)
        if met.any():
            gone = there & np.repeat(met, self._width)
            self._at_barrier[at] = there & ~gone
            if not self._at_barrier[at].any():
                del self._at_barrier[at]
            self.memory.meet(np.flatnonzero(gone), met)
            self._go(at + 1, gone)

    def _report_waiting(self) -> None:
        """Raise the fault of threads that wait for others, which never come."""
        pieces = self.launch.code.pieces
        places = [(pieces[at].instructions[0], mask) for at, mask in self._waiting.items()]
        places += [(piece, mask) for at, mask in self._at_barrier.items() if (piece := pieces[at].barrier) is not None]
        (instruction, mask), *others = places
        also = "".join(f"; others are at {other}" for other, _ in others)
        what = f"threads wait for others of their block or warp, which do not come here{also}"
        raise self.memory.fault("synccheck", instruction, np.flatnonzero(mask), what)


def _places(name: str, number: Any, shape: Sequence[int]) -> dict[str, Any]:
    """Coordinates of numbers in a shape, as registers."""
    x, y, _ = shape
    parts = number % x, number // x % y, number // (x * y)
    return {f"%{name}.{axis}": part.astype(np.int32) for axis, part in zip("xyz", parts, strict=True)}
