"""Memory whose bytes know whether they exist and were written: the GPU's own, and a block's."""

import mmap
from typing import Any

import numpy as np

from ptx.errors import KernelError

UNWRITTEN, WRITTEN = 1, 2
"""The states of a byte. 0 is one that does not exist."""
_GAP = 256
"""Bytes between allocations, which nobody may touch; each begins at a multiple of it."""


def round_up(size: int, unit: int) -> int:
    """The least multiple of `unit` that is not less than `size`."""
    return -(-size // unit) * unit


class Space:
    """Bytes by offset, with their states."""

    def __init__(self, size: int, make: Any = lambda size: np.zeros(size, np.uint8)) -> None:
        self.size, self.data, self.state = size, make(size), make(size)

    def refused(self, at: Any, width: int, writes: bool) -> Any:
        """For each access to `width` bytes from `at` on: 0 if all is well, 1 if it is misaligned or reaches what does
        not exist, 2 if it reads what nobody has written. None stands for zeros."""
        wrong = (at % width != 0) | (at < 0) | (at > self.size - width)
        piece = min(width, 8)
        inside = np.where(wrong, 0, at)[:, None] // piece + np.arange(width // piece)
        states = self.state.view(f"u{piece}")[inside]
        if (states == int.from_bytes(bytes([WRITTEN] * piece))).all() and not wrong.any():
            return None
        by_byte = states.view(np.uint8).reshape(len(at), -1)
        unwritten = (by_byte == UNWRITTEN).any(1) & (not writes)
        refused = np.where(wrong | (by_byte == 0).any(1), 1, np.where(unwritten, 2, 0))
        return refused if refused.any() else None

    def load(self, at: Any, dtype: Any, count: int) -> Any:
        """`count` numbers from each of some offsets on."""
        width = np.dtype(dtype).itemsize
        return self.data.view(dtype)[at[:, None] // width + np.arange(count)]

    def store(self, at: Any, values: Any) -> None:
        """Put the row of numbers that belongs to each offset there."""
        width = values.dtype.itemsize
        where = at[:, None] // width + np.arange(values.shape[1])
        self.data.view(values.dtype)[where] = values
        self.state.view(f"u{width}")[where] = int.from_bytes(bytes([WRITTEN] * width))


class GlobalMemory(Space):
    """All memory of a GPU. No address is used again, so that what was freed is known."""

    SIZE = 1 << 32

    def __init__(self) -> None:
        self._maps: list[Any] = []
        super().__init__(self.SIZE, self._mapped)
        self.base = self.data.ctypes.data
        self._end = _GAP
        self.blocks: dict[int, int] = {}
        """The sizes of what is allocated, by address."""

    def _mapped(self, size: int) -> Any:
        self._maps.append(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        return np.frombuffer(self._maps[-1], np.uint8)

    def allocate(self, size: int) -> int:
        """The address of `size` new bytes, which read as NaN until they are written."""
        start, self._end = self._end, self._end + round_up(size, _GAP) + _GAP
        if self._end > self.SIZE:
            raise MemoryError("the interpreter's memory is used up")
        self.data[start : start + size] = 0xFF
        self.state[start : start + size] = UNWRITTEN
        self.blocks[self.base + start] = size
        return self.base + start

    def free(self, address: int) -> None:
        start, size = address - self.base, self.blocks.pop(address)
        self.state[start : start + size] = 0
        first, last = round_up(start, mmap.PAGESIZE), (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            for each in self._maps:
                each.madvise(mmap.MADV_DONTNEED, first, last - first)

    def mark(self, address: int, size: int, state: int) -> None:
        """Note that the host has written bytes, or that what they hold is nothing."""
        start = address - self.base
        if size and (start < 0 or not self.state[start : start + size].all()):
            raise KernelError(f"memcheck: the host writes {size} bytes at {address:#x}, which are not all allocated")
        self.state[start : start + size] = state

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes and what is known of them."""
        self.mark(target, size, WRITTEN)
        to, start = target - self.base, source - self.base
        if not self.state[start : start + size].all():
            raise KernelError(f"memcheck: the host copies {size} bytes from {source:#x}, which are not all allocated")
        for each in (self.data, self.state):
            each[to : to + size] = each[start : start + size].copy()

    def place(self, address: int) -> str:
        """An address as a person wants to read it."""
        within = [start for start in self.blocks if start <= address]
        if not within:
            return f"address {address:#x}"
        start = max(within)
        return f"address {address:#x}, byte {address - start} of {self.blocks[start]} allocated"
