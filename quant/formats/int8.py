"""Matrices in int8 with a float16 scale for each group of 32 columns: 8.5 bits a weight.

    w[n, k] ≈ values[n, k] · scales[n, k div 32] · 2^unit

Rows and columns of a matrix [N, K] are padded with zeros, K to whole groups and N as the layout needs:

| layout  | values              | scales              | for                                             |
|---------|---------------------|---------------------|-------------------------------------------------|
| rows    | [N, K]              | [N, K/32]           | a table that is read by row (embedding)         |
| tile    | [N/16, K/4, 16, 4]  | [N/16, K/32, 16]    | products: 16 outputs take 4 inputs at a time    |
| columns | [N/S, K, S]         | [N/S, K/32, S]      | products whose input is mostly zero             |

This module knows where quantized numbers lie. The quantizer, a kernel, knows how a row is rounded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import FormatError
from rwkv_cli.numbers import GROUP
from rwkv_cli.quant.dtypes import to_float32
from rwkv_cli.quant.formats.contract import Encoded, Facts, Kind, Part, Shape, Spec, StoredArray
from rwkv_cli.quant.formats.transpose import transposed

NAME = "int8"
QUANTIZED = True
LAYOUTS: Mapping[Kind, str] = {"matrix": "tile", "sparse": "columns", "table": "rows"}
SUFFIXES: tuple[str, ...] = ("", ".scale")

_STRIP = 16
"""Output rows that a tile interleaves."""
_QUAD = 4
"""Input columns of one row that lie together in a tile."""
_UNITS = range(-100, 15)
"""Units that a file may hold."""

Quantizer = Callable[[NDArray[np.float32], int], tuple[NDArray[np.int8], NDArray[np.uint16], float]]
"""A function of rows [R, K] and the unit. It gives int8 values [R, K padded to 32], the bits of float16 scales
[R, K/32], and the squared error of them all."""


@dataclass(frozen=True)
class Int8:
    """A quantized matrix [N, K]; the module's docstring has its formula and layouts."""

    layout: str
    shape: tuple[int, int]
    values: NDArray[np.int8]
    scales: NDArray[np.uint16]
    """The bits of float16 numbers."""
    unit: int
    format: str = field(default=NAME, init=False)

    def float32(self) -> NDArray[np.float32]:
        """The matrix [N, K] that this stands for."""
        N, K = self.shape
        order = _order(self.layout, self.shape)
        q = order.values_as_rows(self.values)
        scale = to_float32(order.scales_as_rows(self.scales), "F16") * np.float32(2.0**self.unit)
        w = q.reshape(len(q), -1, GROUP).astype(np.float32) * scale[:, :, None]
        return w.reshape(len(q), -1)[:N, :K]


class _Order(NamedTuple):
    """The order of a matrix in its layout: blocks of `rows` × `columns` numbers, first to the right and then down."""

    rows: int
    columns: int
    values: Shape
    scales: Shape

    def values_from_rows(self, q: NDArray[np.int8]) -> NDArray[np.int8]:
        """Stored values of quantized rows [R, K padded], where R is a multiple of `rows`."""
        moved = q if self.rows == 1 else transposed(q.reshape(-1, self.rows, q.shape[1]), self.columns)
        return moved.reshape(-1, *self.values[1:])

    def scales_from_rows(self, s: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """Stored scales of the scales [R, K/32] of rows."""
        return s.reshape(-1, self.rows, s.shape[1]).transpose(0, 2, 1).reshape(-1, *self.scales[1:])

    def values_as_rows(self, values: NDArray[np.int8]) -> NDArray[np.int8]:
        """Quantized rows of stored values."""
        across = prod(self.values[1:]) // (self.rows * self.columns)
        blocks = values.reshape(-1, across, self.rows, self.columns)
        return blocks.transpose(0, 2, 1, 3).reshape(-1, across * self.columns)

    def scales_as_rows(self, scales: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """Scales of rows from stored scales."""
        groups = prod(self.scales[1:]) // self.rows
        return scales.reshape(-1, groups, self.rows).transpose(0, 2, 1).reshape(-1, groups)


def _order(layout: str, shape: Shape) -> _Order:
    """The order of a matrix of this shape."""
    N, K = shape
    groups = -(-K // GROUP)
    padded = groups * GROUP
    if layout == "rows":
        return _Order(1, padded, (N, padded), (N, groups))
    if layout == "tile":
        strips = -(-N // _STRIP)
        return _Order(_STRIP, _QUAD, (strips, padded // _QUAD, _STRIP, _QUAD), (strips, groups, _STRIP))
    # the width is the largest of these that divides N, or a strip if none does
    width = next((width for width in (256, 128, 64, 32) if N % width == 0), _STRIP)
    blocks = -(-N // width)
    return _Order(width, 1, (blocks, padded, width), (blocks, groups, width))


def parts(spec: Spec) -> list[Part]:
    """The values and the scales."""
    order = _order(spec.layout, spec.shape)
    return [Part("I8", order.values), Part("F16", order.scales)]


def rows_together(spec: Spec) -> int:
    """The number of rows of one block."""
    return _order(spec.layout, spec.shape).rows


def facts_of(largest: float) -> dict[str, Any]:
    """The unit that brings the largest scale of a tensor to [2^14, 2^15), far from float16's subnormals."""
    exponent = int(np.floor(np.log2(largest / 128))) if largest > 0 else 0
    return {"unit": min(max(exponent - 14, _UNITS[0]), _UNITS[-1])}


def encode(rows: NDArray[np.float32], spec: Spec, facts: Facts, quantizer: Quantizer) -> Encoded:
    """Rounded rows in their layout, padded with zero rows to whole blocks."""
    order = _order(spec.layout, spec.shape)
    values, scales, squared_error = quantizer(rows, facts["unit"])
    short = -len(values) % order.rows
    if short:
        values, scales = np.pad(values, ((0, short), (0, 0))), np.pad(scales, ((0, short), (0, 0)))
    return Encoded([order.values_from_rows(values), order.scales_from_rows(scales)], squared_error)


def accepts(spec: Spec, facts: Facts) -> bool:
    """Return true for a matrix with a unit that conversion could have given it."""
    unit = facts.get("unit")
    return len(spec.shape) == 2 and type(unit) is int and unit in _UNITS


def read(spec: Spec, facts: Facts, arrays: Sequence[StoredArray]) -> Int8:
    """The matrix in these arrays, of which none is copied."""
    values, scales = arrays
    if [Part(array.dtype, array.bits.shape) for array in arrays] != parts(spec):
        found = f"{(values.dtype, scales.dtype)} {values.bits.shape}, {scales.bits.shape}"
        raise FormatError(f"is stored as {found}")
    N, K = spec.shape
    return Int8(spec.layout, (N, K), values.bits, scales.bits, facts["unit"])


def quantize(w: NDArray[np.float32], layout: str, quantizer: Quantizer) -> Int8:
    """The whole matrix `w` [N, K] at once."""
    spec = Spec(layout, w.shape, "F32")
    facts = facts_of(float(np.abs(w).max()))
    values, scales = map(np.ascontiguousarray, encode(w, spec, facts, quantizer).parts)
    return read(spec, facts, [StoredArray("I8", values), StoredArray("F16", scales)])
