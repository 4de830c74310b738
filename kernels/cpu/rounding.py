"""Activations rounded to int16 in the weights' own groups of 32: about 15 bits.

They are `levels` (VNNI: int8 [T, K/32, 2, 32], else int16 [T, K/32, 1, 32] in the order of `levels.IN_FOUR`), `factors`
and `offsets` [T, K/32]. Byte strides follow from the number of groups, so kernels get them as addresses.
"""

from typing import NamedTuple

import numpy as np

from rwkv_cli.kernels.cpu.args import Address, Int, unpack
from rwkv_cli.kernels.cpu.compile import function, has_vnni, kernel
from rwkv_cli.kernels.cpu.elementwise import address_of, span
from rwkv_cli.kernels.cpu.llvm.bits import float_at
from rwkv_cli.kernels.cpu.llvm.levels import ActivationGroup, quantize_step
from rwkv_cli.numbers import GROUP, MOST_LEVEL

VNNI = has_vnni()
PLANES, LEVEL = (2, np.dtype(np.int8)) if VNNI else (1, np.dtype(np.int16))
LEVEL_BYTES = PLANES * GROUP * LEVEL.itemsize
"""A token's levels in one group."""

_quantize_group = quantize_step(VNNI, MOST_LEVEL, False)
_quantize_lerp = quantize_step(VNNI, MOST_LEVEL, True)


class QuantizeArgs(NamedTuple):
    """x [T, K], its rows `stride` bytes apart; delta [T, K] and mix [T, K] or none.

    Rows of mix are `mix_stride` bytes apart (0: one row for all). levels, factors and offsets are as above.
    """

    x: Address
    stride: Int
    tokens: Int
    columns: Int
    delta: Address
    mix: Address
    mix_stride: Int
    levels: Address
    factors: Address
    offsets: Address


@kernel(QuantizeArgs)
def quantize(args: int, part: int, parts: int) -> None:
    """Round x, or x + delta · mix if there is a delta, to integers."""
    a = unpack(args, QuantizeArgs)
    K, delta = a.columns, a.delta
    G = (K + GROUP - 1) // GROUP
    tail = np.zeros((3, GROUP), np.float32)
    begin, end = span(part, parts, a.tokens * G)
    t, g = begin // G, begin % G
    for i in range(begin, end):
        at = g * GROUP * 4
        x, d, m = a.x + t * a.stride + at, delta + t * K * 4 + at, a.mix + t * a.mix_stride + at
        if (g + 1) * GROUP > K:
            copy(x, tail[0], K - g * GROUP)
            if delta != 0:
                copy(d, tail[1], K - g * GROUP)
                copy(m, tail[2], K - g * GROUP)
            x, d, m = address_of(tail), address_of(tail) + GROUP * 4, address_of(tail) + GROUP * 8
        levels, factor, offset = a.levels + i * LEVEL_BYTES, a.factors + i * 4, a.offsets + i * 4
        if delta != 0:
            _quantize_lerp(ActivationGroup(x, d, m, levels, factor, offset))
        else:
            _quantize_group(ActivationGroup(x, 0, 0, levels, factor, offset))
        g += 1
        if g == G:
            t, g = t + 1, 0
    # the tail must live until here, and its address alone does not keep it
    tail[0, 0] = 0


@function()
def copy(address, out, n):
    """out[:n] = the n float32 at `address`."""
    for i in range(n):
        out[i] = float_at(address + i * 4)
