"""The product of one token with a matrix whose input is mostly zero: it reads only the rows that count.

The weights lie in columns (docs/format.md), and x is rounded as in `rounding`. The numbers are the same bits as those
of `matmul.columns`.
"""

from typing import NamedTuple

import numpy as np

from rwkv_cli.kernels.cpu.args import F32, F32_2, I8_3, I8_4, I16_2, I16_4, I64_1, I64_2, U16_3, Int, unpack
from rwkv_cli.kernels.cpu.compile import FIXED_ORDER, kernel
from rwkv_cli.kernels.cpu.elementwise import address_of, span
from rwkv_cli.kernels.cpu.llvm.int8_dot import STRIP, RowGroup, rows_step
from rwkv_cli.kernels.cpu.llvm.levels import CACHE_LINE, prefetch
from rwkv_cli.kernels.cpu.rounding import VNNI
from rwkv_cli.numbers import GROUP

_AHEAD = 1
"""How many groups of 32 rows ahead a product asks for."""
_WIDTH = 128
"""Outputs whose sums stay in registers."""

_sum_wide, _sum_narrow = rows_step(VNNI, _WIDTH), rows_step(VNNI, STRIP)


class NonzeroArgs(NamedTuple):
    """One token's levels as bytes or as words, whichever is there; rows, nonzero [K/32, 32], count [K/32]."""

    bytes: I8_4
    words: I16_4
    rows: I64_2
    nonzero: I16_2
    count: I64_1


@kernel(NonzeroArgs)
def find_nonzero(args: int, part: int, parts: int) -> None:
    """List the levels that are not 0: group g has count[g] of them, rows[g, n] and nonzero[g, n].

    An odd last one gets a level of 0 beside it.
    """
    a = unpack(args, NonzeroArgs)
    rows, levels = a.rows, a.nonzero
    begin, end = span(part, parts, len(a.count))
    for g in range(begin, end):
        n = 0
        for i in range(GROUP):
            if VNNI:
                q = (np.int64(a.bytes[0, g, 0, i]) << 8) + np.int64(a.bytes[0, g, 1, i])
            else:
                q = np.int64(a.words[0, g, 0, i])
            rows[g, n], levels[g, n] = g * GROUP + i, q
            n += q != 0
        if n % 2:
            rows[g, n], levels[g, n] = rows[g, n - 1], 0
        a.count[g] = (n + 1) // 2 * 2


class SparseArgs(NamedTuple):
    """values [B, K, W], scales [B, K/32, W]; the rows to read as `find_nonzero` lists them; factors [1, K/32];
    y [1, B·W]. A part is `width` outputs of a block."""

    values: I8_3
    scales: U16_3
    unit: F32
    rows: I64_2
    nonzero: I16_2
    count: I64_1
    factors: F32_2
    y: F32_2
    add: Int
    width: Int


@kernel(SparseArgs, FIXED_ORDER)
def sparse_columns(args: int, part: int, parts: int) -> None:  # noqa: ARG001
    """`columns` for one token: reads only the rows whose input is not zero."""
    a = unpack(args, SparseArgs)
    values, rows, count, width = a.values, a.rows, a.count, a.width
    K, W, G = values.shape[1], values.shape[2], a.scales.shape[1]
    b, start = part * width // W, part * width % W
    total, here = np.empty(width, np.float32), b * W + start
    for i in range(width):
        total[i] = a.y[0, here + i] if a.add else np.float32(0)
    source, scales = address_of(values) + b * K * W + start, address_of(a.scales) + (b * G * W + start) * 2
    for g in range(G):
        # which rows come is not what a CPU's own prefetcher could guess
        if g + _AHEAD < G:
            for n in range(count[g + _AHEAD]):
                for i in range(0, width, CACHE_LINE):
                    prefetch(source + rows[g + _AHEAD, n] * W + i)
        factor = a.factors[0, g]
        if count[g] == 0:
            # a factor that is NaN must reach the output though every activation beside it is zero
            if factor != factor:
                for i in range(width):
                    total[i] = np.nan
            continue
        row, level = address_of(rows) + g * GROUP * 8, address_of(a.nonzero) + g * GROUP * 2
        at = 0
        while at < width:
            place, scale = address_of(total) + at * 4, scales + (g * W + at) * 2
            group = RowGroup(source + at, W, row, level, count[g], scale, place)
            if at + _WIDTH <= width:
                _sum_wide(group, factor, a.unit)
                at += _WIDTH
            else:
                _sum_narrow(group, factor, a.unit)
                at += STRIP
    y = a.y[0, here : here + width]
    for i in range(width):
        y[i] = total[i]
    # the sums must live until here, and their address alone does not keep them
    total[0] = 0
