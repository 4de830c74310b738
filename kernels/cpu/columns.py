"""y[T, N] = x[T, K] · wᵀ for a matrix whose input is mostly zero: its columns are stored one by one (docs/format.md).

A few tokens read only the columns where the input of one of them is not zero. For many, columns are put into the order
of tiles first. x is rounded to 8 bits (see `rounding`), and the numbers are the same bits either way.
"""

from typing import NamedTuple

import numpy as np

from rwkv_cli.kernels.cpu.args import F32, F32_2, I8_3, I8_4, I16_3, I16_4, I64_1, I64_2, U16_3, Address, Int, unpack
from rwkv_cli.kernels.cpu.compile import FIXED_ORDER, function, kernel
from rwkv_cli.kernels.cpu.elementwise import address_of, span
from rwkv_cli.kernels.cpu.llvm.int8_dot import STRIP, RowGroup, rows_step
from rwkv_cli.kernels.cpu.llvm.levels import CACHE_LINE, IN_FOUR, interleave, prefetch
from rwkv_cli.kernels.cpu.matmul import GROUP_BYTES, Activations, Ending, Strips, multiplier
from rwkv_cli.kernels.cpu.rounding import VNNI
from rwkv_cli.numbers import GROUP

FAR = 4096
"""How many bytes of columns ahead a product asks for. A memory answers after some hundred cycles."""
_WIDTH = 128
"""Outputs of one token whose sums stay in registers."""
FEW, MOST = 4, 8
"""Tokens whose sums for `_PIECE` outputs stay in registers, and how many tokens are a few: with more, turning columns
into tiles first costs less."""
_PIECE = 64 if VNNI else 16

_multiply = multiplier(8, halves=True)
_one_wide, _one_narrow = rows_step(VNNI, _WIDTH, 1), rows_step(VNNI, STRIP, 1)
_few_wide, _few_narrow = rows_step(VNNI, _PIECE, FEW), rows_step(VNNI, STRIP, FEW)


class NonzeroArgs(NamedTuple):
    """Levels as bytes or as words, whichever is there; rows [K/32, 32], nonzero [K/32, most tokens, 32], count [K/32].

    There is room for 1 or for MOST tokens.
    """

    bytes: I8_4
    words: I16_4
    tokens: Int
    rows: I64_2
    nonzero: I16_3
    count: I64_1


@kernel(NonzeroArgs)
def find_nonzero(args: int, part: int, parts: int) -> None:
    """List the rows where the level of a token is not 0: group g has count[g], rows[g, n] with nonzero[g, t, n].

    An odd last one gets levels of 0 beside it, and so does a token that is not there. More than MOST tokens have none.
    """
    a = unpack(args, NonzeroArgs)
    rows, levels, T = a.rows, a.nonzero, a.tokens
    room = levels.shape[1]
    begin, end = span(part, parts, len(a.count))
    if room < T:
        return
    for g in range(begin, end):
        n = 0
        for i in range(GROUP):
            some = _level(a, 0, g, i)
            levels[g, 0, n] = some
            for t in range(1, T):
                q = _level(a, t, g, i)
                levels[g, t, n] = q
                some |= q
            rows[g, n] = g * GROUP + i
            n += some != 0
        if n % 2:
            rows[g, n] = rows[g, n - 1]
            for t in range(T):
                levels[g, t, n] = 0
        for t in range(T, room):
            levels[g, t] = 0
        a.count[g] = (n + 1) // 2 * 2


@function()
def _level(a, t, g, i):
    """Level i of a group of a token."""
    if VNNI:
        return np.int64(a.bytes[t, g, 0, i])
    return np.int64(a.words[t, g, 0, i & ~3 | IN_FOUR[i & 3]])


class ColumnsArgs(NamedTuple):
    """values [B, K, W], scales [B, K/32, W]; x as levels, factors and offsets, and as `find_nonzero` lists it;
    y [T, B·W]. All parts have as many outputs. A few tokens take `width` at a time, in the first part of these."""

    values: I8_3
    scales: U16_3
    unit: F32
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


@kernel(ColumnsArgs, FIXED_ORDER)
def columns(args: int, part: int, parts: int) -> None:
    """y = x · wᵀ, or y += x · wᵀ with `add`."""
    a = unpack(args, ColumnsArgs)
    W, outputs = a.values.shape[2], a.y.shape[1] // parts
    b, first = part * outputs // W, part * outputs % W
    if a.tokens > a.nonzero.shape[1]:
        _many(a, b, first, outputs // STRIP)
    elif first % a.width == 0:
        _few(a, b, first)


class Ahead(NamedTuple):
    """The next column that a product asks for: its group, and its place in the group's list."""

    group: int
    place: int


@function()
def ask_ahead(a, ahead, wanted, source, stride, width):
    """Ask for as many columns as are wanted, from `ahead` on: `width` bytes each, where column 0 is at `source`.

    Which columns come is not what a CPU's own prefetcher could guess. Returns where it stopped, and how many are still
    wanted.
    """
    g, n = ahead
    while wanted > 0 and g < len(a.count):
        if n < a.count[g]:
            column = source + a.rows[g, n] * stride
            for i in range(0, width, CACHE_LINE):
                prefetch(column + i)
            n, wanted = n + 1, wanted - 1
        else:
            g, n = g + 1, 0
    return Ahead(g, n), wanted


@function(FIXED_ORDER)
def _many(a, b, first, strips):
    """The product with one or two strips of block b, from output `first` on. They serve all tokens."""
    values, scales = a.values, a.scales
    K, W, G = values.shape[1], values.shape[2], scales.shape[1]
    tile, scale = np.empty((strips, G * GROUP_BYTES), np.int8), np.empty((strips, G, STRIP), np.uint16)
    for s in range(strips):
        source = address_of(values) + b * K * W + first + s * STRIP
        for k in range(0, K, 4):
            interleave(source + k * W, W, address_of(tile) + s * G * GROUP_BYTES + k * STRIP)
        for g in range(G):
            for i in range(STRIP):
                scale[s, g, i] = scales[b, g, first + s * STRIP + i]
    w = Strips(address_of(tile), address_of(scale), strips, G, a.unit)
    x = Activations(a.levels, address_of(a.factors), a.offsets, a.tokens)
    _multiply(w, x, a.y, a.y[:0], Ending(b * W + first, a.add, 0))
    # these must live until here, and their addresses alone do not keep them
    tile[0, 0], scale[0, 0, 0] = 0, 0


@function(FIXED_ORDER)
def _few(a, b, first):
    """The product with a part of block b, from output `first` on: reads only the columns that count."""
    values, rows, count, width = a.values, a.rows, a.count, a.width
    K, W, G, T = values.shape[1], values.shape[2], a.scales.shape[1], a.tokens
    together = 1 if T == 1 else FEW
    room, begin = a.nonzero.shape[1], b * W + first
    total, factor = np.zeros((-(-T // together) * together, width), np.float32), np.zeros(MOST, np.float32)
    if a.add:
        for t in range(T):
            for i in range(width):
                total[t, i] = a.y[t, begin + i]
    source, scales = address_of(values) + b * K * W + first, address_of(a.scales) + (b * G * W + first) * 2
    ahead, wanted = Ahead(0, 0), FAR // width
    for g in range(G):
        wanted += count[g]
        ahead, wanted = ask_ahead(a, ahead, wanted, source, W, width)
        for t in range(T):
            factor[t] = a.factors[t, g]
        if count[g] == 0:
            # a factor that is NaN must reach the output though every activation beside it is zero
            for t in range(T):
                if factor[t] != factor[t]:
                    total[t] = np.nan
            continue
        for t in range(0, T, together):
            levels = address_of(a.nonzero) + (g * room + t) * GROUP * 2
            at = 0
            while at < width:
                group = RowGroup(
                    weights=source + at,
                    stride=W,
                    rows=address_of(rows) + g * GROUP * 8,
                    levels=levels,
                    level_stride=GROUP * 2,
                    length=count[g],
                    scales=scales + (g * W + at) * 2,
                    factors=address_of(factor) + t * 4,
                    factor_stride=4,
                    totals=address_of(total) + (t * width + at) * 4,
                    total_stride=width * 4,
                )
                if together == 1 and at + _WIDTH <= width:
                    _one_wide(group, a.unit)
                    at += _WIDTH
                elif together == 1:
                    _one_narrow(group, a.unit)
                    at += STRIP
                elif at + _PIECE <= width:
                    _few_wide(group, a.unit)
                    at += _PIECE
                else:
                    _few_narrow(group, a.unit)
                    at += STRIP
    for t in range(T):
        for i in range(width):
            a.y[t, begin + i] = total[t, i]
    # these must live until here, and their addresses alone do not keep them
    total[0, 0], factor[0] = 0, 0
