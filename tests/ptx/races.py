"""Races: accesses to one byte by several threads, of which one writes and which no barrier keeps in order."""

from typing import Any, NamedTuple

import numpy as np

from ptx.parse import Instruction
from ptx.spaces import GlobalMemory
from ptx.warps import LANES

_SEVERAL = np.int32(-(1 << 30))
"""Threads of several warps."""


class SharedRaces:
    """Who has written and read each grain of some blocks' shared memory since the last barrier.

    A grain is as many bytes as the kernel's least access has. Threads count from 1 within their block. −w stands for
    several threads of the w-th warp. Among a warp's threads `bar.warp.sync` is a barrier, which ends an epoch.
    """

    def __init__(self, blocks: int, size: int, grain: int) -> None:
        self.grain, self._of_block = grain, size // grain
        shape = blocks * self._of_block
        self.writer, self.reader, self.copier = (np.zeros(shape, np.int32) for _ in range(3))
        self._written, self._read = np.zeros(shape, np.int32), np.zeros(shape, np.int32)

    def forget(self, blocks: Any) -> None:
        """Begin anew for some blocks, whose threads have met."""
        for each in (self.writer, self.reader):
            each.reshape(-1, self._of_block)[blocks] = 0

    def grains(self, at: Any, size: int) -> Any:
        return at[:, None] // self.grain + np.arange(size // self.grain)

    def read(self, grains: Any, thread: Any, epoch: Any) -> Any:
        """Note reads. Returns for each the thread that it races with, or 0."""
        thread, epoch = thread[:, None], epoch[:, None]
        raced = self._racing(self.writer[grains], self._written[grains], thread, epoch)
        known, warp = self.reader[grains], -_warp(thread)
        code = np.where((known == 0) | (known == thread), thread, np.where(_warp(known) == -warp, warp, _SEVERAL))
        self.reader[grains] = code
        others = self.reader[grains]
        if (clash := others != code).any():  # of this instruction
            self.reader[grains[clash]] = np.broadcast_to(warp, clash.shape)[clash]
            afar = clash & (_warp(others) != -warp)
            self.reader[grains[afar]] = _SEVERAL
        self._read[grains] = epoch
        return raced

    def write(self, grains: Any, thread: Any, epoch: Any) -> Any:
        """Note writes. Returns for each the thread that it races with, or 0."""
        thread, epoch = thread[:, None], epoch[:, None]
        raced = self._racing(self.writer[grains], self._written[grains], thread, epoch)
        raced = np.where(raced, raced, self._racing(self.reader[grains], self._read[grains], thread, epoch))
        self.writer[grains] = thread
        other = self.writer[grains]
        self._written[grains], self.reader[grains] = epoch, 0
        return np.where(other == thread, raced, other)

    def _racing(self, known: Any, when: Any, thread: Any, epoch: Any) -> Any:
        """Those of some threads or groups of them that are not this thread, and not of this warp in an epoch before."""
        before = (_warp(known) == _warp(thread)) & (when < epoch)
        return np.where((known == 0) | (known == thread) | before, 0, known)


def _warp(thread: Any) -> Any:
    """The warp, from 1, of a thread or of a group of them; 0 for nobody, and less for several warps."""
    return np.where(thread > 0, (thread + LANES - 1) // LANES, -thread)


THREADS = 1 << 11
"""More threads than a block has. A thread's number in a grid counts as if each block had so many."""


class Access(NamedTuple):
    """An instruction's accesses to global memory by threads of the grid: `size` bytes from an offset on, each in an
    epoch between two barriers of its block."""

    instruction: Instruction
    at: Any
    size: int
    thread: Any
    epoch: Any
    writes: bool

    def grains(self, size: int) -> Any:
        """The numbers of the grains that are accessed, a row each."""
        return self.at[:, None] // size + np.arange(self.size // size)


class Race(NamedTuple):
    """Two accesses to one address."""

    one: Access
    other: Access
    threads: tuple[int, int]
    address: int


class GlobalRaces:
    """The accesses of a launch to global memory. A grain is as many bytes as the kernel's least access has."""

    def __init__(self, memory: GlobalMemory, grain: int) -> None:
        self._memory, self._grain = memory, grain
        self.accesses: list[Access] = []

    def found(self) -> Race | None:
        """The first race: between blocks, or between a block's threads in one epoch."""
        writes = [each.grains(self._grain).ravel() for each in self.accesses if each.writes]
        if not writes:
            return None
        written = np.unique(np.concatenate(writes))
        columns = [self._columns(i, written) for i in range(len(self.accesses))]
        grain, thread, epoch, writing, which = (np.concatenate(column) for column in zip(*columns, strict=True))
        block = thread // THREADS
        pair = _conflict((grain,), block, writing) or _conflict((epoch, block, grain), thread, writing)
        if pair is None:
            return None
        one, other = pair
        threads = int(thread[one]), int(thread[other])
        address = int(grain[one]) * self._grain + self._memory.base
        return Race(self.accesses[which[one]], self.accesses[which[other]], threads, address)

    def _columns(self, number: int, written: Any) -> tuple[Any, ...]:
        """Of an instruction's accesses to grains that are written: grain, thread, epoch, if it writes, its number."""
        access = self.accesses[number]
        grains = access.grains(self._grain)
        near = np.minimum(np.searchsorted(written, grains), len(written) - 1)
        row, _ = chosen = np.nonzero(written[near] == grains)
        same = np.full(len(row), access.writes), np.full(len(row), number)
        return grains[chosen], access.thread[row], access.epoch[row], *same


def _conflict(keys: tuple[Any, ...], who: Any, writing: Any) -> tuple[int, int] | None:
    """Two accesses with the same keys, of which one writes, by different ones."""
    order = np.lexsort((who, *keys))
    changes = [np.diff(key[order], prepend=key[order[0]] - 1) != 0 for key in keys]
    starts = np.flatnonzero(np.logical_or.reduce(changes))
    ends = np.append(starts[1:], len(order)) - 1
    bad = (who[order[starts]] != who[order[ends]]) & np.logical_or.reduceat(writing[order], starts)
    if not bad.any():
        return None
    first = np.argmax(bad)
    group = order[starts[first] : ends[first] + 1]
    one = group[np.argmax(writing[group])]
    return int(one), int(group[np.argmax(who[group] != who[one])])
