"""y[T, N] = x[T, K] · wᵀ for weights in codes of 4, 5 or 6 bits. The layouts are in docs/format.md.

x is rounded as for int8. One token takes codes as they are read. Many tokens take two strips of 16 outputs that were
turned into int8 tiles before. The numbers are the same.
"""

from typing import NamedTuple

import numpy as np

from rwkv_cli.kernels.cpu.args import F32_1, F32_2, I8_2, I8_3, I16_2, I64_1, I64_2, U8_3, Address, Int, unpack
from rwkv_cli.kernels.cpu.compile import FIXED_ORDER, kernel
from rwkv_cli.kernels.cpu.elementwise import activate, address_of, span
from rwkv_cli.kernels.cpu.llvm.codes import (
    CodeGroup,
    CodeRows,
    code_rows_step,
    code_step,
    expand_columns,
    expand_tile,
)
from rwkv_cli.kernels.cpu.llvm.int8_dot import STRIP, LevelGroup
from rwkv_cli.kernels.cpu.llvm.levels import CACHE_LINE, prefetch
from rwkv_cli.kernels.cpu.matmul import GROUP_BYTES, Activations, Ending, Strips, multiplier, start
from rwkv_cli.kernels.cpu.rounding import LEVEL_BYTES, VNNI
from rwkv_cli.numbers import GROUP, LEVELS

BLOCK = 128
"""Outputs of a block of columns."""
_FAR = 2048
"""How many bytes ahead the product of one token asks for."""
_AHEAD = 1
"""How many groups of 32 columns ahead a product with a sparse input asks for."""
_BITS = (4, 5, 6)

_one4, _one5, _one6 = (code_step(bits, VNNI) for bits in _BITS)
_rows4, _rows5, _rows6 = (code_rows_step(bits, VNNI) for bits in _BITS)
_tile4, _tile5, _tile6 = map(expand_tile, _BITS)
_columns4, _columns5, _columns6 = map(expand_columns, _BITS)
_multiply = multiplier(halves=False)
_LEVELS4, _LEVELS5, _LEVELS6 = (np.array(LEVELS[bits], np.float32) for bits in _BITS)


class CodesArgs(NamedTuple):
    """Weights as tiles [S, G, 64·bits] or columns [B, K, 16·bits], and scales [S or B, G, 16 or 128]; rows, as many.

    levels, factors and offsets of x; y [T, N padded]; bias [1, N] or none. A part is `strips_per_part` strips.
    """

    bits: Int
    values: U8_3
    scales: I8_3
    rows: F32_2
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
    bits = a.bits
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
            levels = LevelGroup(a.levels + g * LEVEL_BYTES, 0, a.factors + g * 4, a.offsets + g * 4, 0)
            if bits == 4:
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
def expanded(args: int, part: int, parts: int) -> None:  # noqa: ARG001
    """`tiles_one` for any number of tokens, and for columns as well. Two strips at a time are turned into tiles."""
    a = unpack(args, CodesArgs)
    bits, W, G = a.bits, a.scales.shape[2], a.scales.shape[1]
    bytes_, tile_bytes = a.values.shape[2], G * GROUP_BYTES
    first, last = part * a.strips_per_part, min((part + 1) * a.strips_per_part, len(a.scales) * W // STRIP)
    tile, scale = np.empty((2, tile_bytes), np.int8), np.empty((2, G, STRIP), np.float32)
    x = Activations(a.levels, a.factors, a.offsets, a.tokens)
    for s in range(first, last, 2):
        strips = min(2, last - s)
        b, row = s * STRIP // W, s * STRIP % W
        source = address_of(a.values) + b * a.values.shape[1] * bytes_
        if W == BLOCK:
            for k in range(0, G * GROUP, 4):
                to = address_of(tile) + k * STRIP
                if bits == 4:
                    _columns4(source + k * bytes_, bytes_, row // 32, to, tile_bytes)
                elif bits == 5:
                    _columns5(source + k * bytes_, bytes_, row // 32, to, tile_bytes)
                else:
                    _columns6(source + k * bytes_, bytes_, row // 32, to, tile_bytes)
        else:
            for i in range(strips * G):
                at, to = source + i * bytes_, address_of(tile) + i * GROUP_BYTES
                if bits == 4:
                    _tile4(at, to)
                elif bits == 5:
                    _tile5(at, to)
                else:
                    _tile6(at, to)
        for i in range(strips):
            b, row = (s + i) * STRIP // W, (s + i) * STRIP % W
            for g in range(G):
                for j in range(STRIP):
                    scale[i, g, j] = np.float32(a.scales[b, g, row + j]) * a.rows[b, row + j]
        w = Strips(address_of(tile), address_of(scale), strips, G, 0.0)
        _multiply(w, x, a.y, a.bias, Ending(s * STRIP, a.add, a.activation))
    # these must live until here, and their addresses alone do not keep them
    tile[0, 0], scale[0, 0, 0] = 0, 0


class SparseCodesArgs(NamedTuple):
    """values [B, K, 16·bits], scales [B, K/32, 128], rows [B, 128]; the columns to read as `sparse.find_nonzero` lists
    them; factors [1, K/32]; y [1, B·128]. A part is a block."""

    bits: Int
    values: U8_3
    scales: I8_3
    rows: F32_2
    columns: I64_2
    nonzero: I16_2
    count: I64_1
    factors: F32_2
    y: F32_2
    add: Int


@kernel(SparseCodesArgs, FIXED_ORDER)
def sparse_codes(args: int, part: int, parts: int) -> None:  # noqa: ARG001
    """`expanded` of columns for one token: reads only the columns whose input is not zero."""
    a = unpack(args, SparseCodesArgs)
    bits, columns, count, stride = a.bits, a.columns, a.count, a.values.shape[2]
    G = a.scales.shape[1]
    here = part * BLOCK
    total = np.empty(BLOCK, np.float32)
    for i in range(BLOCK):
        total[i] = a.y[0, here + i] if a.add else np.float32(0)
    values, scales = address_of(a.values) + part * a.values.shape[1] * stride, address_of(a.scales) + part * G * BLOCK
    rows, out = address_of(a.rows) + here * 4, address_of(total)
    for g in range(G):
        # which columns come is not what a CPU's own prefetcher could guess
        if g + _AHEAD < G:
            for n in range(count[g + _AHEAD]):
                for i in range(0, stride, CACHE_LINE):
                    prefetch(values + columns[g + _AHEAD, n] * stride + i)
        factor = a.factors[0, g]
        if count[g] == 0:
            # a factor that is NaN must reach the output though every activation beside it is zero
            if factor != factor:
                for i in range(BLOCK):
                    total[i] = np.nan
            continue
        numbers, levels = address_of(columns) + g * GROUP * 8, address_of(a.nonzero) + g * GROUP * 2
        group = CodeRows(values, stride, numbers, levels, count[g], scales + g * BLOCK, rows, out)
        if bits == 4:
            _rows4(group, factor)
        elif bits == 5:
            _rows5(group, factor)
        else:
            _rows6(group, factor)
    y = a.y[0, here : here + BLOCK]
    for i in range(BLOCK):
        y[i] = total[i]
    # the sums must live until here, and their address alone does not keep them
    total[0] = 0


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
