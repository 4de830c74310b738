"""Weights in the GPU's memory: matrices in the order of fragments (docs/cuda.md), the others as stored."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import StoredFloats, StoredInt8, StoredMatrix, StoredPacked
from rwkv_cli.kernels.cuda.device import fragments
from rwkv_cli.kernels.cuda.device.codes import STRIP
from rwkv_cli.kernels.cuda.device.compile import Kernel
from rwkv_cli.kernels.cuda.driver import Block, stream, synchronize, upload
from rwkv_cli.numbers import GROUP, LEVELS

_REPACK_BLOCKS = 1024


@dataclass(frozen=True, eq=False)
class Fragments:
    """A matrix [N, K] that multiplies: int8 (8 bits) or codes."""

    shape: tuple[int, int]
    bits: int
    values: Block
    scales: Block
    strips: int
    groups: int
    by_columns: bool
    """True if it is stored by columns."""
    unit: float = 1.0
    """A power of two that all scales are multiplied by."""
    rows: Block | None = None
    """A factor of each row of codes."""
    skips_zeros = False

    @property
    def nbytes(self) -> int:
        return self.values.size + self.scales.size + (self.rows.size if self.rows else 0)


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
class CodeTable:
    """A matrix [V, K] of codes that is read by row."""

    shape: tuple[int, int]
    bits: int
    values: Block
    scales: Block
    rows: Block
    levels: Block
    """float32, what each code stands for."""
    skips_zeros = False

    @property
    def nbytes(self) -> int:
        return self.values.size + self.scales.size + self.rows.size


@dataclass(frozen=True, eq=False)
class FloatMatrix:
    """A float matrix [N, K], which multiplies or is read by row."""

    shape: tuple[int, int]
    bits: Block
    dtype: str
    width: int
    """K padded to whole groups."""
    skips_zeros = False

    @property
    def nbytes(self) -> int:
        return self.bits.size


CudaWeight = Fragments | Int8Table | CodeTable | FloatMatrix


def weight(stored: StoredMatrix) -> CudaWeight:
    """The matrix for kernels."""
    return _FORMATS[stored.format](stored)


def _floats(stored: StoredFloats) -> FloatMatrix:
    N, K = stored.shape
    width = -(-K // GROUP) * GROUP
    bits = stored.bits if width == K else np.pad(stored.bits, ((0, 0), (0, width - K)))
    return FloatMatrix((N, K), _uploaded(bits), stored.dtype, width)


def _int8(stored: StoredInt8) -> Int8Table | Fragments:
    N, K = stored.shape
    if stored.layout == "rows":
        _, width = stored.values.shape
        return Int8Table((N, K), _uploaded(stored.values), _uploaded(stored.scales), width, 2.0**stored.unit)
    return _fragments(stored, 8, unit=2.0**stored.unit)


def _codes(stored: StoredPacked) -> CodeTable | Fragments:
    N, K = stored.shape
    bits, rows = stored.bits, _uploaded(stored.rows)
    if stored.layout.startswith("rows"):
        levels = _uploaded(np.array(LEVELS[bits], np.float32))
        return CodeTable((N, K), bits, _uploaded(stored.values), _uploaded(stored.scales), rows, levels)
    return _fragments(stored, bits, rows=rows)


def _fragments(stored: StoredInt8 | StoredPacked, bits: int, unit: float = 1.0, rows: Block | None = None) -> Fragments:
    """A matrix that is stored as tiles or columns, repacked on the GPU."""
    N, K = stored.shape
    blocks, groups, width = stored.scales.shape
    strips = blocks * width // STRIP
    values, scales = _uploaded(stored.values), _uploaded(stored.scales)
    tiles = stored.layout.startswith("tile")
    out = Fragments((N, K), bits, Block(values.size), Block(scales.size), strips, groups, not tiles, unit, rows)
    threads = min(fragments.REPACK_THREADS, 32 * strips)

    def repack(kernel: Kernel, units: int, *arguments: int) -> None:
        """Launch a kernel whose threads take so many units in turns."""
        kernel.dispatcher[min(_REPACK_BLOCKS, -(-units // (8 * threads))), threads, stream()](*arguments)

    source = values.address, 0 if tiles else width, out.values.address, strips, groups
    if bits == 8:
        repack(fragments.repack, values.size // 4, *source)
    else:
        repack(fragments.repack_codes, strips * groups * 32, *source, bits)
    of_scales = scales.address, width, out.scales.address, strips, groups, stored.scales.itemsize
    repack(fragments.repack_scales, stored.scales.size, *of_scales)
    synchronize()  # before what was stored is freed
    return out


_FORMATS: dict[str, Callable[[Any], CudaWeight]] = {
    "int8": _int8,
    "float": _floats,
    **dict.fromkeys(("q4", "q5", "q6"), _codes),
}


def _uploaded(values: NDArray[Any]) -> Block:
    block = Block(values.nbytes)
    upload(block.address, np.ascontiguousarray(values))
    return block
