"""The closed set of stored tensors: floats as they came, and int8 with scales in groups of 32."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUP = 32
"""Neighbouring input columns that share one scale."""

STRIP = 16
"""Output rows that one tile interleaves."""

BITS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<u2"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
}
"""safetensors dtype to the NumPy dtype of its bits (NumPy has no bfloat16)."""

FLOATS = ("F32", "F16", "BF16")


def to_float32(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Values of `bits` (any shape), exact: `dtype` is one of FLOATS."""
    if dtype == "F32":
        return np.ascontiguousarray(bits, dtype=np.float32)
    if dtype == "F16":
        return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


@dataclass(frozen=True)
class Floats:
    """A float tensor: `bits` is float32 for F32, uint16 for F16 and BF16."""

    dtype: str
    bits: NDArray[Any]
    format = "float"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    def float32(self) -> NDArray[np.float32]:
        return to_float32(self.bits, self.dtype)


@dataclass(frozen=True)
class Int8:
    """A matrix [N, K] in int8: `w[n, k] ≈ values[n, k] · scales[n, k // 32] · 2**unit`.

    `scales` holds the bits of float16. N and K are padded with zeros: K to 32, N as `layout` needs.

    | layout  | values              | scales              | for                                        |
    |---------|---------------------|---------------------|--------------------------------------------|
    | rows    | [N, K]              | [N, K/32]           | a table read by row (embedding)            |
    | tile    | [N/16, K/4, 16, 4]  | [N/16, K/32, 16]    | matmul: 16 outputs take 4 inputs at a time |
    | columns | [N/S, K, S]         | [N/S, K/32, S]      | matmul whose input is mostly zero          |
    """

    layout: str
    shape: tuple[int, int]
    values: NDArray[np.int8]
    scales: NDArray[np.uint16]
    unit: int
    format = "int8"

    def float32(self) -> NDArray[np.float32]:
        """The matrix that this stands for, [N, K]."""
        if self.layout == "rows":
            q, s = self.values, self.scales
        elif self.layout == "tile":
            strips, quads = self.values.shape[:2]
            q = self.values.transpose(0, 2, 1, 3).reshape(strips * STRIP, quads * 4)
            s = self.scales.transpose(0, 2, 1).reshape(strips * STRIP, -1)
        else:
            blocks, K, width = self.values.shape
            q = self.values.transpose(0, 2, 1).reshape(blocks * width, K)
            s = self.scales.transpose(0, 2, 1).reshape(blocks * width, -1)
        scale = to_float32(s, "F16") * np.float32(2.0**self.unit)
        w = q.reshape(len(q), -1, GROUP).astype(np.float32) * scale[:, :, None]
        N, K = self.shape
        return w.reshape(len(q), -1)[:N, :K]


def stored_shapes(layout: str, shape: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `values` and `scales` for a matrix [N, K] in `layout`."""
    N, K = shape
    groups = -(-K // GROUP)
    if layout == "rows":
        return (N, groups * GROUP), (N, groups)
    if layout == "tile":
        strips = -(-N // STRIP)
        return (strips, groups * GROUP // 4, STRIP, 4), (strips, groups, STRIP)
    width = column_width(N)
    blocks = -(-N // width)
    return (blocks, groups * GROUP, width), (blocks, groups, width)


def column_width(N: int) -> int:
    """S of the layout `columns`: 256 outputs where that divides N, else the largest smaller power of two ≥ 16."""
    return next((width for width in (256, 128, 64, 32) if N % width == 0), STRIP)
