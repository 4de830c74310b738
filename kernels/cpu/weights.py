"""Matrices as the CPU's kernels read them: where they are mapped, nothing is copied."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import StoredFloats, StoredInt8, StoredMatrix, StoredPacked


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """An int8 matrix [N, K] in one of the layouts of docs/format.md."""

    shape: tuple[int, int]
    layout: str
    values: NDArray[np.int8]
    scales: NDArray[np.uint16]
    unit: float
    """2^112 of the tensor's unit: float16 bits stand for 2^−112 of their value as float32 bits."""

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    @property
    def skips_zeros(self) -> bool:
        return self.layout == "columns"


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A matrix [N, K] in codes of some bits, in one of the layouts of docs/format.md."""

    shape: tuple[int, int]
    layout: str
    bits: int
    values: NDArray[np.uint8]
    scales: NDArray[np.int8]
    rows: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + self.rows.nbytes

    @property
    def skips_zeros(self) -> bool:
        return self.layout == f"columns{self.bits}"


@dataclass(frozen=True, eq=False)
class FloatWeight:
    """A float matrix [N, K] as its bits."""

    shape: tuple[int, int]
    dtype: str
    bits: NDArray[Any]
    skips_zeros = False

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes


CpuWeight = Int8Weight | PackedWeight | FloatWeight


def weight(stored: StoredMatrix) -> CpuWeight:
    """The matrix for kernels."""
    return _FORMATS[stored.format](stored)


def _int8(stored: StoredInt8) -> Int8Weight:
    N, K = stored.shape
    values, scales = np.ascontiguousarray(stored.values), np.ascontiguousarray(stored.scales)
    return Int8Weight((N, K), stored.layout, values, scales, float(np.float32(2.0 ** (112 + stored.unit))))


def _packed(stored: StoredPacked) -> PackedWeight:
    N, K = stored.shape
    arrays = map(np.ascontiguousarray, (stored.values, stored.scales, stored.rows))
    return PackedWeight((N, K), stored.layout, stored.bits, *arrays)


def _floats(stored: StoredFloats) -> FloatWeight:
    N, K = stored.shape
    return FloatWeight((N, K), stored.dtype, np.ascontiguousarray(stored.bits))


_FORMATS: dict[str, Callable[[Any], CpuWeight]] = {
    "int8": _int8,
    "q4": _packed,
    "q5": _packed,
    "q6": _packed,
    "float": _floats,
}
"""The formats of stored matrices that the CPU has kernels for."""
