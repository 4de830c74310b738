"""Matrices in 4, 5 or 6 bits with an int8 scale for each group of 32 columns: 4.25, 5.25 or 6.25 bits a weight.

    w[n, k] ≈ level[code[n, k]] · scales[n, k div 32] · rows[n]

The levels of each number of bits are `numbers.LEVELS`. Scales have either sign, so that the largest weight of a group
meets the end of the levels that suits it.

Rows and columns of a matrix [N, K] are padded, K to whole groups and N as the layout needs. The codes that belong
together, 8 pieces of U codes, lie in 8·U·bits/8 bytes. With B for the number of bits and G for K/32:

| layout   | values          | scales       | rows     | piece m, code i of it                                      |
|----------|-----------------|--------------|----------|------------------------------------------------------------|
| rowsB    | [N, G, 4·B]     | [N, G]       | [N]      | column 4·m + i of a group; U = 4                           |
| tileB    | [N/16, G, 64·B] | [N/16, G, 16]| [N/16,16]| row i div 4, column 4·m + i mod 4 of a group; U = 64       |
| columnsB | [N/128, K, 16·B]| [N/128,G,128]| [N/128,128]| row 16·m + i, for one column; U = 16                     |

The bytes are three planes of U bytes a slice: 4·U bytes hold the lower four bits, piece 2·p in the lower and piece
2·p + 1 in the upper half of slice p. With 5 bits, bit m of U more bytes is the fifth bit of piece m. With 6 bits,
2·U more bytes hold the upper two bits, those of piece 4·v + i in bits 2·i and 2·i + 1 of slice v.

This module knows where codes lie. The quantizer, a kernel, knows how a row is rounded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import FormatError
from rwkv_cli.numbers import GROUP, LEVELS
from rwkv_cli.quant.formats.contract import Encoded, Facts, Kind, Part, Shape, Spec, StoredArray
from rwkv_cli.quant.formats.transpose import transposed

PIECES = 8
_STRIP = 16
"""Output rows that a tile interleaves."""
_CHUNK = 128
"""Output rows whose codes of one column are packed together."""

Rounded = tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.float32], float]
"""Codes [R, K padded to 32], scales [R, K/32] and rows [R] of some rows, and the squared error of them all."""
Quantizer = Callable[[NDArray[np.float32]], Rounded]


def pack(codes: NDArray[Any], bits: int) -> NDArray[Any]:
    """Bytes [..., U·bits] of codes [..., 8, U]. Words whose bytes are codes make words of such bytes."""
    low = codes & _each_byte(codes, 15)
    slices = [low[..., ::2, :] | low[..., 1::2, :] << 4]
    each = bits - 4
    if each:
        high = codes >> 4 & _each_byte(codes, (1 << each) - 1)
        high = high.reshape(*codes.shape[:-2], PIECES * each // 8, 8 // each, codes.shape[-1])
        slices.append(high[..., 0, :])
        for piece in range(1, 8 // each):
            slices[1] |= high[..., piece, :] << each * piece
    return np.concatenate(slices, axis=-2).reshape(*codes.shape[:-2], -1)


def _each_byte(like: NDArray[Any], value: int) -> Any:
    """A number of an array's type with this value in each of its bytes."""
    return like.dtype.type(int.from_bytes(bytes([value] * like.itemsize), "little"))


def unpack(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [..., 8, U] of bytes [..., U·bits]."""
    unit = values.shape[-1] // bits
    slices = values.reshape(*values.shape[:-1], bits, unit)
    low = np.stack([slices[..., :4, :] & 15, slices[..., :4, :] >> 4], axis=-2)
    codes: NDArray[np.uint8] = low.reshape(*values.shape[:-1], PIECES, unit)
    each = bits - 4
    if each:
        shifts = np.arange(0, 8, each, dtype=np.uint8)[:, None]
        high = slices[..., 4:, None, :] >> shifts & np.uint8((1 << each) - 1)
        codes |= high.reshape(codes.shape) << 4
    return codes


class _Order(NamedTuple):
    """The order of a matrix in its layout: `rows` of it lie together, and so do 8 pieces of `unit` codes."""

    layout: str
    rows: int
    unit: int
    blocks: int
    groups: int

    def packed(self, codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
        """Values of the codes [R, K padded] of rows, where R is a multiple of `rows`: [blocks, G or K, bytes]."""
        if self.layout == "columns":
            columns = codes.shape[1]
            slices = pack(codes.reshape(-1, PIECES, _STRIP * columns), bits)
            values = transposed(slices.reshape(-1, self.rows // PIECES * bits, columns), 1)
            return values.reshape(*values.shape[:2], -1)
        words = np.ascontiguousarray(codes).view(np.uint32).reshape(-1, self.rows, self.groups, PIECES)
        packed: NDArray[np.uint8] = pack(words.transpose(0, 2, 3, 1), bits).view(np.uint8)
        return packed

    def codes(self, pieces: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The codes of rows from their pieces."""
        if self.layout == "rows":
            return pieces.reshape(-1, self.groups * GROUP)
        if self.layout == "tile":
            tiles = pieces.reshape(-1, self.groups, PIECES, _STRIP, 4).transpose(0, 3, 1, 2, 4)
            return tiles.reshape(-1, self.groups * GROUP)
        return pieces.transpose(0, 2, 3, 4, 1).reshape(-1, self.groups * GROUP)

    def chunks(self, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Stored values with the bytes of each 8 pieces in the last dimension."""
        return (
            values.reshape(*values.shape[:-1], -1, values.shape[-1] * _CHUNK // self.rows)
            if self.unit == 16
            else values
        )

    def together(self, scales: NDArray[Any]) -> NDArray[Any]:
        """Stored scales of the scales [R, G] of rows."""
        if self.layout == "rows":
            return scales
        return scales.reshape(-1, self.rows, self.groups).transpose(0, 2, 1)

    def apart(self, scales: NDArray[Any]) -> NDArray[Any]:
        """Scales of rows [R, G] from stored scales."""
        return scales if self.layout == "rows" else scales.transpose(0, 2, 1).reshape(-1, self.groups)


@dataclass(frozen=True)
class Packed:
    """A matrix [N, K] of `bits` bits a code; the module's docstring has its formula and layouts."""

    format: str
    layout: str
    shape: tuple[int, int]
    bits: int
    values: NDArray[np.uint8]
    scales: NDArray[np.int8]
    rows: NDArray[np.float32]

    def float32(self) -> NDArray[np.float32]:
        """The matrix [N, K] that this stands for."""
        N, K = self.shape
        order = _order(self.layout, self.shape)
        levels = np.array(LEVELS[self.bits], np.float32)[order.codes(unpack(order.chunks(self.values), self.bits))]
        scale = order.apart(self.scales).astype(np.float32) * self.rows.reshape(-1, 1)
        w: NDArray[np.float32] = levels.reshape(len(levels), -1, GROUP) * scale[:, :, None]
        return w.reshape(len(levels), -1)[:N, :K]


def _order(layout: str, shape: Shape) -> _Order:
    """The order of a matrix of this shape."""
    N, K = shape
    name, groups = layout[:-1], -(-K // GROUP)
    wide = next((rows for rows in (512, 256) if N % rows == 0), _CHUNK)
    rows, unit = {"rows": (1, 4), "tile": (_STRIP, 64), "columns": (wide, 16)}[name]
    return _Order(name, rows, unit, -(-N // rows), groups)


class PackedFormat:
    """The format of so many bits (`contract.Format`)."""

    QUANTIZED = True
    SUFFIXES: tuple[str, ...] = ("", ".scale", ".row")

    def __init__(self, bits: int) -> None:
        self.bits, self.NAME = bits, f"q{bits}"
        self.LAYOUTS: Mapping[Kind, str] = {
            "matrix": f"tile{bits}",
            "sparse": f"columns{bits}",
            "table": f"rows{bits}",
        }

    def parts(self, spec: Spec) -> list[Part]:
        """The codes, the scales and the rows."""
        order = _order(spec.layout, spec.shape)
        columns = order.layout == "columns"
        across, chunks = (order.groups * GROUP, order.rows // _CHUNK) if columns else (order.groups, 1)
        scales = (order.blocks, order.groups) + ((order.rows,) if order.rows > 1 else ())
        rows = (order.blocks, order.rows) if order.rows > 1 else (order.blocks,)
        values = (order.blocks, across, chunks * order.unit * self.bits)
        return [Part("U8", values), Part("I8", scales), Part("F32", rows)]

    def rows_together(self, spec: Spec) -> int:
        """The number of rows of one block."""
        return _order(spec.layout, spec.shape).rows

    def facts_of(self, largest: float) -> dict[str, Any]:
        """Nothing: each row has a scale of its own."""
        return {}

    def encode(self, rows: NDArray[np.float32], spec: Spec, facts: Facts, quantizer: Quantizer) -> Encoded:
        """Rounded rows in their layout, padded with rows of scale 0 to whole blocks."""
        order = _order(spec.layout, spec.shape)
        codes, scales, row, squared_error = quantizer(rows)
        short = -len(codes) % order.rows
        if short:
            codes, scales = np.pad(codes, ((0, short), (0, 0))), np.pad(scales, ((0, short), (0, 0)))
            row = np.pad(row, (0, short))
        together = row.reshape(-1, order.rows) if order.rows > 1 else row
        return Encoded([order.packed(codes, self.bits), order.together(scales), together], squared_error)

    def accepts(self, spec: Spec, facts: Facts) -> bool:
        """Return true for any matrix."""
        return len(spec.shape) == 2

    def read(self, spec: Spec, facts: Facts, arrays: Sequence[StoredArray]) -> Packed:
        """The matrix in these arrays, of which none is copied."""
        found = [Part(array.dtype, array.bits.shape) for array in arrays]
        if found != self.parts(spec):
            raise FormatError(f"is stored as {', '.join(f'{part.dtype} {part.shape}' for part in found)}")
        N, K = spec.shape
        values, scales, rows = (array.bits for array in arrays)
        return Packed(self.NAME, spec.layout, (N, K), self.bits, values, scales, rows)


def quantize(w: NDArray[np.float32], layout: str, quantizer: Quantizer) -> Packed:
    """The whole matrix `w` [N, K] at once."""
    format, spec = PackedFormat(int(layout[-1])), Spec(layout, w.shape, "F32")
    arrays = map(np.ascontiguousarray, format.encode(w, spec, {}, quantizer).parts)
    return format.read(spec, {}, [StoredArray(p.dtype, a) for p, a in zip(format.parts(spec), arrays, strict=True)])
