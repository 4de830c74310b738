"""Weights in the GPU's memory: int8 in the order of fragments (docs/cuda.md), floats as they are stored."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import DeviceError
from rwkv_cli.kernels.contract import StoredFloats, StoredInt8, StoredMatrix
from rwkv_cli.kernels.cuda.device import fragments
from rwkv_cli.kernels.cuda.driver import Block, stream, synchronize, upload

_REPACK_BLOCKS = 1024


@dataclass(frozen=True, eq=False)
class Fragments:
    """An int8 matrix [N, K] that multiplies."""

    shape: tuple[int, int]
    values: Block
    scales: Block
    strips: int
    groups: int
    unit: float
    """A power of two that all scales are multiplied by."""
    skips_zeros = False

    @property
    def nbytes(self) -> int:
        return self.values.size + self.scales.size


@dataclass(frozen=True, eq=False)
class Int8Table:
    """An int8 matrix [V, K] that is read by row."""

    shape: tuple[int, int]
    values: Block
    scales: Block
    width: int
    """K padded to whole groups."""
    unit: float
    skips_zeros = False

    @property
    def nbytes(self) -> int:
        return self.values.size + self.scales.size


@dataclass(frozen=True, eq=False)
class FloatMatrix:
    """A float matrix [N, K], which multiplies or is read by row."""

    shape: tuple[int, int]
    bits: Block
    dtype: str
    skips_zeros = False

    @property
    def nbytes(self) -> int:
        return self.bits.size


CudaWeight = Fragments | Int8Table | FloatMatrix


def weight(stored: StoredMatrix) -> CudaWeight:
    """The matrix for kernels."""
    if stored.format not in _FORMATS:
        raise DeviceError(f"the GPU has no kernels for weights in {stored.format} yet; use int8, or --device cpu")
    return _FORMATS[stored.format](stored)


def _floats(stored: StoredFloats) -> FloatMatrix:
    N, K = stored.shape
    return FloatMatrix((N, K), _uploaded(stored.bits), stored.dtype)


def _int8(stored: StoredInt8) -> Int8Table | Fragments:
    N, K = stored.shape
    if stored.layout == "rows":
        _, width = stored.values.shape
        return Int8Table((N, K), _uploaded(stored.values), _uploaded(stored.scales), width, 2.0**stored.unit)
    return _fragments((N, K), stored)


def _fragments(shape: tuple[int, int], stored: StoredInt8) -> Fragments:
    """A matrix that is stored as tiles or columns, repacked on the GPU."""
    blocks, groups, width = stored.scales.shape
    strips = blocks * width // fragments.STRIP
    values, scales = _uploaded(stored.values), _uploaded(stored.scales)
    out = Fragments(shape, Block(values.size), Block(scales.size), strips, groups, 2.0**stored.unit)
    threads = min(fragments.REPACK_THREADS, 32 * strips)
    tiles = stored.layout == "tile"
    for kernel, source, to, wide, words in (
        (fragments.repack, values, out.values, 0 if tiles else width, values.size // 4),
        (fragments.repack_scales, scales, out.scales, width, scales.size // 2),
    ):
        grid = min(_REPACK_BLOCKS, -(-words // (8 * threads)))
        kernel.dispatcher[grid, threads, stream()](source.address, wide, to.address, strips, groups)
    synchronize()  # before what was stored is freed
    return out


_FORMATS: dict[str, Callable[[Any], CudaWeight]] = {"int8": _int8, "float": _floats}
"""The formats of stored matrices that the GPU has kernels for."""


def _uploaded(values: NDArray[Any]) -> Block:
    block = Block(values.nbytes)
    upload(block.address, np.ascontiguousarray(values))
    return block
