"""Matrices as the CPU's kernels read them: where they are mapped, nothing is copied."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import StoredFloats, StoredInt8, StoredMatrix


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
class FloatWeight:
    """A float matrix [N, K] as its bits."""

    shape: tuple[int, int]
    dtype: str
    bits: NDArray[Any]
    skips_zeros = False

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes


CpuWeight = Int8Weight | FloatWeight


def weight(stored: StoredMatrix) -> CpuWeight:
    """The matrix for kernels."""
    N, K = stored.shape
    if stored.format == "float":
        floats = cast(StoredFloats, stored)
        return FloatWeight((N, K), floats.dtype, np.ascontiguousarray(floats.bits))
    int8 = cast(StoredInt8, stored)
    values, scales = np.ascontiguousarray(int8.values), np.ascontiguousarray(int8.scales)
    return Int8Weight((N, K), int8.layout, values, scales, float(np.float32(2.0 ** (112 + int8.unit))))
