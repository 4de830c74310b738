"""y[T, N] = x[T, K] · wᵀ for weights in codes of 4, 5 or 6 bits. The layouts are in docs/format.md.

x is rounded as for int8, and to 8 bits for some products with codes of 4. One token takes codes as they are read, and
so do a few in columns. Many take two strips of 16 outputs that were turned into int8 tiles before. The numbers are the
same bits.
"""

from typing import NamedTuple

import numpy as np

from rwkv_cli.kernels.cpu.args import F32_1, F32_2, I8_2, I8_3, I16_3, I64_1, I64_2, U8_3, Address, Int, unpack
from rwkv_cli.kernels.cpu.columns import FAR, FEW, MOST, Ahead, ask_ahead
from rwkv_cli.kernels.cpu.compile import FIXED_ORDER, function, kernel
from rwkv_cli.kernels.cpu.elementwise import activate, address_of, span
from rwkv_cli.kernels.cpu.llvm.codes import (
    CodeGroup,
    CodeRows,
    code_pair_step,
    code_rows_step,
    code_step,
    expand_columns,
    expand_tile,
)
from rwkv_cli.kernels.cpu.llvm.int8_dot import STRIP, LevelGroup
from rwkv_cli.kernels.cpu.llvm.levels import CACHE_LINE, prefetch
from rwkv_cli.kernels.cpu.matmul import GROUP_BYTES, Activations, Ending, Strips, multiplier, start
from rwkv_cli.kernels.cpu.rounding import BYTES_8, BYTES_15, VNNI
from rwkv_cli.numbers import GROUP, LEVELS

CHUNK = 128
"""Outputs whose codes of one column are packed together."""
_PAIRS = CHUNK // (2 * STRIP)
"""Pairs of strips in a chunk."""
_FAR = 2048
"""How many bytes ahead the product of one token asks for."""
_BITS = (4, 5, 6)

_coarse4 = code_step(4, VNNI, 8)
_one4, _one5, _one6 = (code_step(bits, VNNI, 15) for bits in _BITS)
_rows4, _rows5, _rows6 = (code_rows_step(bits, VNNI) for bits in _BITS)
_pair4, _pair5, _pair6 = (code_pair_step(bits, VNNI, FEW) for bits in _BITS)
_tile4, _tile5, _tile6 = map(expand_tile, _BITS)
_columns4, _columns5, _columns6 = map(expand_columns, _BITS)
_multiply_8, _multiply_15 = (multiplier(bits, halves=False) for bits in (8, 15))
_LEVELS4, _LEVELS5, _LEVELS6 = (np.array(LEVELS[bits], np.float32) for bits in _BITS)


class CodesArgs(NamedTuple):
    """Weights as tiles [S, G, 64·bits], scales [S, G, 16], rows [S, 16]; levels, factors and offsets of x.

    Levels have 15 bits, or 8 with codes of 4. y [T, N padded]; bias [1, N] or none. A part is `strips_per_part` strips.
    """

    bits: Int
    values: U8_3
    scales: I8_3
    rows: F32_2
    activation_bits: Int
    levels: Address
    factors: Address
    offsets: Address
    tokens: Int
    y: F32_2
    bias: F32_2
    add: Int
    activation: Int
    strips_per_part: Int


@kernel(CodesArgs, FIXED_ORDER)
def tiles_one(args: int, part: int, parts: int) -> None:  # noqa: ARG001
    """y = activation(x · wᵀ + bias), or y += x · wᵀ with `add`, for one token and tiles."""
    a = unpack(args, CodesArgs)
    S, G, group_bytes = a.values.shape
    bits, coarse = a.bits, a.activation_bits == 8
    level_bytes = BYTES_8 if coarse else BYTES_15
    first, last = part * a.strips_per_part, min((part + 1) * a.strips_per_part, S)
    sums = np.zeros(STRIP, np.float32)
    out = address_of(sums)
    values, scales = address_of(a.values) + first * G * group_bytes, address_of(a.scales) + first * G * STRIP
    for s in range(first, last):
        here = slice(s * STRIP, (s + 1) * STRIP)
        start(sums, a.y[0, here], a.bias[0, here] if len(a.bias) else a.y[0, :0], a.add)
        rows = address_of(a.rows) + s * STRIP * 4
        for g in range(G):
            for i in range(0, group_bytes, CACHE_LINE):
                prefetch(values + i + _FAR)
            weights = CodeGroup(values, scales, rows)
            levels = LevelGroup(a.levels + g * level_bytes, 0, a.factors + g * 4, a.offsets + g * 4, 0)
            if bits == 4 and coarse:
                _coarse4(weights, levels, out)
            elif bits == 4:
                _one4(weights, levels, out)
            elif bits == 5:
                _one5(weights, levels, out)
            else:
                _one6(weights, levels, out)
            values, scales = values + group_bytes, scales + STRIP
        if a.activation:
            activate(sums, a.activation)
        y = a.y[0, here]
        for i in range(len(y)):
            y[i] = sums[i]
    # the sums must live until here, and their address alone does not keep them
    sums[0] = 0


@kernel(CodesArgs, FIXED_ORDER)
def tiles_many(args: int, part: int, parts: int) -> None:  # noqa: ARG001
    """`tiles_one` for any number of tokens. Two strips at a time are turned into int8 tiles."""
    a = unpack(args, CodesArgs)
    bits, G = a.bits, a.scales.shape[1]
    bytes_, tile_bytes = a.values.shape[2], G * GROUP_BYTES
    first, last = part * a.strips_per_part, min((part + 1) * a.strips_per_part, len(a.scales))
    tile, scale = np.empty((2, tile_bytes), np.int8), np.empty((2, G, STRIP), np.float32)
    x = Activations(a.levels, a.factors, a.offsets, a.tokens)
    for s in range(first, last, 2):
        strips = min(2, last - s)
        source = address_of(a.values) + s * G * bytes_
        for i in range(strips * G):
            at, to = source + i * bytes_, address_of(tile) + i * GROUP_BYTES
            if bits == 4:
                _tile4(at, to)
            elif bits == 5:
                _tile5(at, to)
            else:
                _tile6(at, to)
        for i in range(strips):
            for g in range(G):
                for j in range(STRIP):
                    scale[i, g, j] = np.float32(a.scales[s + i, g, j]) * a.rows[s + i, j]
        w = Strips(address_of(tile), address_of(scale), strips, G, 0.0)
        ending = Ending(s * STRIP, a.add, a.activation)
        if a.activation_bits == 8:
            _multiply_8(w, x, a.y, a.bias, ending)
        else:
            _multiply_15(w, x, a.y, a.bias, ending)
    # these must live until here, and their addresses alone do not keep them
    tile[0, 0], scale[0, 0, 0] = 0, 0


class CodeColumnsArgs(NamedTuple):
    """values [B, K, W·bits/8], scales [B, K/32, W], by_row [B, W]; the rest as in `columns.ColumnsArgs`.

    A part is two strips for many tokens. `width` outputs are whole chunks.
    """

    bits: Int
    values: U8_3
    scales: I8_3
    by_row: F32_2
    levels: Address
    factors: F32_2
    offsets: Address
    tokens: Int
    rows: I64_2
    nonzero: I16_3
    count: I64_1
    y: F32_2
    add: Int
    width: Int


@kernel(CodeColumnsArgs, FIXED_ORDER)
def columns(args: int, part: int, parts: int) -> None:
    """y = x · wᵀ, or y += x · wᵀ with `add`."""
    a = unpack(args, CodeColumnsArgs)
    W, outputs = a.scales.shape[2], a.y.shape[1] // parts
    b, first = part * outputs // W, part * outputs % W
    if a.tokens > a.nonzero.shape[1]:
        _many(a, b, first)
    elif first % a.width == 0:
        _few(a, b, first)


@function(FIXED_ORDER)
def _many(a, b, first):
    """The product with two strips of block b, from output `first` on. They become tiles, which serve all tokens."""
    bits, G, stride, W = a.bits, a.scales.shape[1], a.values.shape[2], a.scales.shape[2]
    tile_bytes, pair = G * GROUP_BYTES, first // (2 * STRIP) % _PAIRS
    tile, scale = np.empty((2, tile_bytes), np.int8), np.empty((2, G, STRIP), np.float32)
    source = address_of(a.values) + b * a.values.shape[1] * stride + first // CHUNK * STRIP * bits
    to = address_of(tile)
    for _ in range(0, G * GROUP, 4):
        if bits == 4:
            _columns4(source, stride, pair, to, tile_bytes)
        elif bits == 5:
            _columns5(source, stride, pair, to, tile_bytes)
        else:
            _columns6(source, stride, pair, to, tile_bytes)
        source, to = source + 4 * stride, to + 4 * STRIP
    for i in range(2):
        for g in range(G):
            for j in range(STRIP):
                row = first + i * STRIP + j
                scale[i, g, j] = np.float32(a.scales[b, g, row]) * a.by_row[b, row]
    w = Strips(address_of(tile), address_of(scale), 2, G, 0.0)
    x = Activations(a.levels, address_of(a.factors), a.offsets, a.tokens)
    _multiply_8(w, x, a.y, a.y[:0], Ending(b * W + first, a.add, 0))
    # these must live until here, and their addresses alone do not keep them
    tile[0, 0], scale[0, 0, 0] = 0, 0


@function(FIXED_ORDER)
def _few(a, b, first):
    """The product with a part of block b, from output `first` on: reads only the columns that count."""
    bits, rows, count, stride, width = a.bits, a.rows, a.count, a.values.shape[2], a.width
    G, W, T, room = a.scales.shape[1], a.scales.shape[2], a.tokens, a.nonzero.shape[1]
    together = 1 if T == 1 else FEW
    total, factor = np.zeros((-(-T // together) * together, width), np.float32), np.zeros(MOST, np.float32)
    begin = b * W + first
    if a.add:
        for t in range(T):
            for i in range(width):
                total[t, i] = a.y[t, begin + i]
    source = address_of(a.values) + b * a.values.shape[1] * stride + first * bits // 8
    ahead, wanted = Ahead(0, 0), FAR * 8 // (width * bits)
    for g in range(G):
        wanted += count[g]
        ahead, wanted = ask_ahead(a, ahead, wanted, source, stride, width * bits // 8)
        for t in range(T):
            factor[t] = a.factors[t, g]
        if count[g] == 0:
            # a factor that is NaN must reach the output though every activation beside it is zero
            for t in range(T):
                if factor[t] != factor[t]:
                    total[t] = np.nan
            continue
        for t in range(0, T, together):
            for at in range(0, width, CHUNK):
                group = CodeRows(
                    values=source + at * bits // 8,
                    stride=stride,
                    rows=address_of(rows) + g * GROUP * 8,
                    levels=address_of(a.nonzero) + (g * room + t) * GROUP * 2,
                    level_stride=GROUP * 2,
                    length=count[g],
                    scales=address_of(a.scales) + (b * G + g) * W + first + at,
                    by_row=address_of(a.by_row) + (begin + at) * 4,
                    factors=address_of(factor) + t * 4,
                    factor_stride=4,
                    totals=address_of(total) + (t * width + at) * 4,
                    total_stride=width * 4,
                )
                if together == 1:
                    if bits == 4:
                        _rows4(group)
                    elif bits == 5:
                        _rows5(group)
                    else:
                        _rows6(group)
                else:
                    for pair in range(_PAIRS):
                        if bits == 4:
                            _pair4(group, pair)
                        elif bits == 5:
                            _pair5(group, pair)
                        else:
                            _pair6(group, pair)
    for t in range(T):
        for i in range(width):
            a.y[t, begin + i] = total[t, i]
    # these must live until here, and their addresses alone do not keep them
    total[0, 0], factor[0] = 0, 0


class EmbedCodesArgs(NamedTuple):
    """ids [T]; values [V, K/32, 4·bits], scales [V, K/32], rows [V]; out [T, K]."""

    bits: Int
    ids: I64_1
    values: U8_3
    scales: I8_2
    rows: F32_1
    out: F32_2


@kernel(EmbedCodesArgs, FIXED_ORDER)
def embed_codes(args: int, part: int, parts: int) -> None:
    """out[t] = row ids[t] of a table."""
    a = unpack(args, EmbedCodesArgs)
    bits, out = a.bits, a.out
    levels = _LEVELS4 if bits == 4 else _LEVELS5 if bits == 5 else _LEVELS6
    begin, end = span(part, parts, len(a.ids))
    for t in range(begin, end):
        token = a.ids[t]
        for d in range(out.shape[1]):
            group, piece, i = a.values[token, d // GROUP], d % GROUP // 4, d % 4
            code = (group[piece // 2 * 4 + i] >> (piece % 2 * 4)) & 15
            if bits == 5:
                code |= ((group[16 + i] >> piece) & 1) << 4
            elif bits == 6:
                code |= ((group[16 + piece // 4 * 4 + i] >> (piece % 4 * 2)) & 3) << 4
            out[t, d] = levels[code] * (np.float32(a.scales[token, d // GROUP]) * a.rows[token])
