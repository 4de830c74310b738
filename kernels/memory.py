"""Plans which of a program's arrays may lie in the same memory. Every lifetime is known before anything runs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwkv_cli.kernels.program import Dtype

NUMPY_DTYPES: dict[Dtype, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
"""The numbers of a program as numpy knows them."""

ALIGN = 64
"""Bytes. Every array begins at a multiple of it, so that none shares a cache line with another."""


@dataclass(eq=False)
class Buffer:
    """Memory for one array: `size` bytes, in use from step `first` to step `last`, both included."""

    size: int
    first: int | None = None
    last: int = 0

    def used_at(self, step: int) -> None:
        """Extend the lifetime to `step`. Steps come in order."""
        if self.first is None:
            self.first = step
        self.last = step


def plan(buffers: Iterable[Buffer], align: int = ALIGN) -> tuple[dict[Buffer, int], int]:
    """An offset for each buffer that is used, and the bytes of all together.

    Two buffers overlap in memory only if no step uses both and none lies between the uses of one. Each buffer, in the
    order of first use, gets the lowest place that is free for its whole life: what was read last is likely still in a
    cache.
    """
    offsets: dict[Buffer, int] = {}
    living: list[Buffer] = []
    end = 0
    for buffer in sorted((b for b in buffers if b.first is not None), key=lambda b: b.first or 0):
        assert buffer.first is not None
        living = sorted((b for b in living if b.last >= buffer.first), key=offsets.__getitem__)
        size, at = -(-buffer.size // align) * align, 0
        for other in living:
            if offsets[other] - at >= size:
                break
            at = max(at, offsets[other] + -(-other.size // align) * align)
        offsets[buffer] = at
        living.append(buffer)
        end = max(end, at + size)
    return offsets, end
