"""Steps: kernels with their arguments, written once, then run by a team of threads any number of times."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import Watch
from rwkv_cli.kernels.cpu.args import View, pack
from rwkv_cli.kernels.cpu.compile import Kernel
from rwkv_cli.kernels.cpu.team import BARRIER, COLUMNS, PARTS, team
from rwkv_cli.kernels.memory import ALIGN, Buffer, plan
from rwkv_cli.kernels.program import Count, Input, InputMatrix

_SECONDS, _FASTER = 0.1, 8
"""The time between two calls of a `watch`, and how much longer the next part of a list may be than the one before."""
SMALL = 1 << 14
"""Numbers. A step with fewer is one part: it is done before another would begin."""


class Share(NamedTuple):
    """The number of parts of a step, for n rows.

    There are none if n is 0, and one if n · `columns` numbers are few. Else there are n · `per_row`, at most `most`.
    """

    rows: Count | None
    """None if the step has `most` parts in every run."""
    columns: int
    per_row: int
    most: int

    @classmethod
    def fixed(cls, parts: int, rows: Count | None = None) -> "Share":
        """`parts` parts, however many rows there are; none if there is a count of rows and it is 0."""
        return cls(rows, SMALL, parts, parts)


class Steps:
    """A list of steps in the making. Each step sees what those before the last barrier have written."""

    def __init__(self) -> None:
        self.kernels: list[Kernel] = []
        self.records: list[NamedTuple] = []
        self.shares: list[Share] = []
        self.barriers: list[bool] = []
        self._group = 0
        self._buffers: list[Buffer] = []

    def empty(self, shape: tuple[int | Count, ...], dtype: Any = np.float32) -> View:
        """Memory for an array. Where it lies is planned when the list is complete."""
        dtype = np.dtype(dtype)
        size = math.prod(n.most if isinstance(n, Count) else n for n in shape) * dtype.itemsize
        self._buffers.append(Buffer(size))
        return View(self._buffers[-1], shape, dtype)

    def add(self, kernel: Kernel, arguments: NamedTuple, share: Share, barrier: bool = True) -> None:
        """Append a step; its parts run in any order and at the same time.

        Without a barrier, the steps after it may run at the same time too, up to the next barrier.
        """
        if not isinstance(arguments, kernel.record):
            raise TypeError(f"{kernel.name} takes {kernel.record.__name__}, not {type(arguments).__name__}")
        self.kernels.append(kernel)
        self.records.append(arguments)
        self.shares.append(share)
        self.barriers.append(barrier)
        for value in arguments:
            if isinstance(value, View) and isinstance(value.base, Buffer):
                value.base.used_at(self._group)
        self._group += barrier

    def barrier(self) -> None:
        """Have what is added from here on see what all before have written."""
        if self.barriers and not self.barriers[-1]:
            self.barriers[-1] = True
            self._group += 1

    def keep(self, view: View) -> None:
        """Keep an array's memory for itself until the end, so that it can be read after a run."""
        if isinstance(view.base, Buffer):
            view.base.used_at(self._group)

    def finish(self, inputs: Sequence[Input | InputMatrix] = ()) -> "Runnable":
        """Plan the memory, and make the list ready to run."""
        self.barrier()
        return Runnable(self, inputs, *plan(self._buffers))


class Runnable:
    """A finished list of steps with its memory. One thread at a time may run it."""

    def __init__(
        self, steps: Steps, inputs: Sequence[Input | InputMatrix], offsets: Mapping[Buffer, int], size: int
    ) -> None:
        self._inputs = tuple(inputs)
        self._workspace, self._offsets = _aligned(size), offsets
        self._sized = {i.shape[0]: i.name for i in inputs if isinstance(i.shape[0], Count)}
        counts = {count: n for n, count in enumerate(self._sized)}
        slots: list[int] = []
        moving: list[tuple[int, int, int]] = []
        sizes: list[tuple[int, int]] = []
        self._kept: list[Any] = []
        table = np.zeros((len(steps.kernels), COLUMNS), np.int64)
        for row, (kernel, record) in enumerate(zip(steps.kernels, steps.records, strict=True)):
            begin, packed = len(slots), pack(record)
            slots += packed.slots
            self._kept += packed.arrays
            for at, view in packed.views:
                if isinstance(view.base, Buffer):
                    slots[begin + at] = self._workspace.ctypes.data + offsets[view.base] + view.offset
                else:
                    moving.append((begin + at, self._inputs.index(view.base), view.offset))
            sizes += [(begin + at, counts[count]) for at, count in packed.counts]
            table[row] = kernel.address, begin, 0, steps.barriers[row]
        self._steps, self._args = table, np.array(slots, np.int64)
        self._counters = np.zeros(len(table), np.int64)
        # what a run fills in: addresses of inputs, numbers of rows, and the parts that follow from them
        self._address_slots, self._address_inputs, self._address_offsets = _columns(moving, 3)
        self._size_slots, self._size_counts = _columns(sizes, 2)
        fixed = len(counts)
        rows = [fixed if share.rows is None else counts[share.rows] for share in steps.shares]
        self._share_rows = np.array(rows, np.int64)
        self._share_columns, self._share_per_row, self._share_most = _columns([s[1:] for s in steps.shares], 3)
        self._lengths: list[int] | None = None

    def run(self, threads: int, arrays: Mapping[str, NDArray[Any]] | None = None, watch: Watch | None = None) -> None:
        """Run the steps on an array for each input, by name. `watch` is that of `contract.Executable`."""
        given = [arrays[i.name] for i in self._inputs] if arrays is not None else []
        if len(self._address_slots):
            bases = np.array([array.ctypes.data for array in given], np.int64)
            self._args[self._address_slots] = bases[self._address_inputs] + self._address_offsets
        lengths = [len(arrays[name]) for name in self._sized.values()] if arrays is not None else []
        if lengths != self._lengths:
            self._set_lengths(lengths)
        if watch is None:
            team(threads).run(self._steps, self._args, self._counters)
        else:
            self._run_watched(threads, watch)

    def _run_watched(self, threads: int, watch: Watch) -> None:
        """Run the steps in parts that take about `_SECONDS`, and call `watch` after each."""
        ends = np.flatnonzero(self._steps[:, BARRIER]) + 1
        done, group, groups = 0, 0, 1
        while group < len(ends):
            start = time.perf_counter()
            group = min(group + groups, len(ends))
            part = slice(done, int(ends[group - 1]))
            team(threads).run(self._steps[part], self._args, self._counters[part])
            groups = max(1, int(groups * min(_SECONDS / max(time.perf_counter() - start, 1e-9), _FASTER)))
            done = part.stop
            watch(done / len(self._steps))

    def _set_lengths(self, lengths: list[int]) -> None:
        """Fill in the numbers of rows and how many parts each step then has. Raises ValueError for too many rows."""
        for (count, name), length in zip(self._sized.items(), lengths, strict=True):
            if length > count.most:
                raise ValueError(f"{name} has {length} rows, and there is room for {count.most}")
        self._lengths = None  # until all is filled in: a fork or an error may come between
        numbers = np.array([*lengths, 1], np.int64)
        self._args[self._size_slots] = numbers[self._size_counts]
        rows = numbers[self._share_rows]
        parts = np.minimum(rows * self._share_per_row, self._share_most)
        self._steps[:, PARTS] = np.where(rows * self._share_columns < SMALL, np.minimum(rows, 1), parts)
        self._lengths = lengths

    def read(self, view: View) -> NDArray[Any]:
        """Copy the rows of a kept array that the last run computed."""
        assert isinstance(view.base, Buffer)
        sizes = dict(zip(self._sized, self._lengths or [], strict=True))
        shape = tuple(sizes[n] if isinstance(n, Count) else n for n in view.shape)
        begin = self._offsets[view.base] + view.offset
        raw = self._workspace[begin : begin + int(np.prod(shape)) * view.dtype.itemsize]
        return raw.view(view.dtype).reshape(shape).copy()


def _columns(rows: Sequence[Sequence[int]], width: int) -> list[NDArray[np.int64]]:
    """The columns of a table, one array each."""
    return list(np.array(rows, np.int64).reshape(-1, width).T.copy())


def _aligned(size: int) -> NDArray[np.uint8]:
    """Memory that begins at a multiple of ALIGN."""
    block = np.empty(size + ALIGN, np.uint8)
    start = -block.ctypes.data % ALIGN
    return block[start : start + size]
