"""Memory of a recorded program on the GPU: what it keeps, and what its activations lend each other."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.cuda.array import DeviceArray
from rwkv_cli.kernels.cuda.driver import Block, upload

_ALIGN = 256


class _Borrowed:
    """A block that goes back to its pool with the last array on it: what runs later may use it again."""

    def __init__(self, pool: list[Block], block: Block) -> None:
        self._pool, self._block, self.address = pool, block, block.address

    def __del__(self) -> None:
        self._pool.append(self._block)


def round_up(size: int, unit: int) -> int:
    """To a multiple of `unit`."""
    return -(-size // unit) * unit


class Memory:
    """Blocks that live as long as this does, since launches know nothing but their addresses."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._free: dict[int, list[Block]] = {}
        self._constants: dict[bytes, int] = {}

    def keep(self, size: int) -> Block:
        """A new block."""
        self._blocks.append(Block(size))
        return self._blocks[-1]

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32) -> DeviceArray:
        """An array whose block later ones get when it is no longer referred to."""
        size = round_up(max(1, math.prod(shape)) * np.dtype(dtype).itemsize, _ALIGN)
        pool = self._free.setdefault(size, [])
        return DeviceArray(_Borrowed(pool, pool.pop() if pool else self.keep(size)), shape, dtype)

    def int64(self, values: NDArray[Any] | list[Any]) -> int:
        """The address of a copy of `values`; equal ones, as all layers have, share it."""
        table = np.ascontiguousarray(values, np.int64)
        key = table.tobytes()
        if key not in self._constants:
            self._constants[key] = self.keep(table.nbytes).address
            upload(self._constants[key], table)
        return self._constants[key]
