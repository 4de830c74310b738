"""Activations rounded to integers of 8 or of 15 bits in the weights' own groups of 32.

They are `levels` (VNNI: int8 [T, K/32, planes, 32], else int16 [T, K/32, 1, 32] in the order of `levels.IN_FOUR`),
`factors` and `offsets` [T, K/32]. Byte strides follow from the number of groups, so kernels get them as addresses.
"""

import math
from typing import NamedTuple

import numpy as np

from rwkv_cli.kernels.cpu.args import Address, Int, unpack
from rwkv_cli.kernels.cpu.compile import function, has_vnni, kernel
from rwkv_cli.kernels.cpu.elementwise import address_of, span
from rwkv_cli.kernels.cpu.llvm.bits import float_at
from rwkv_cli.kernels.cpu.llvm.int8_dot import PLANES
from rwkv_cli.kernels.cpu.llvm.levels import ActivationGroup, quantize_step
from rwkv_cli.numbers import GROUP

VNNI = has_vnni()
LEVEL = np.dtype(np.int8) if VNNI else np.dtype(np.int16)
SHAPES = {bits: (planes if VNNI else 1, GROUP) for bits, planes in PLANES.items()}
"""The shape of a token's levels in one group, by their bits."""
BYTES_8, BYTES_15 = (math.prod(SHAPES[bits]) * LEVEL.itemsize for bits in (8, 15))
"""Their size."""

_plain_8, _plain_15 = (quantize_step(VNNI, bits, False) for bits in (8, 15))
_lerp_8, _lerp_15 = (quantize_step(VNNI, bits, True) for bits in (8, 15))


class QuantizeArgs(NamedTuple):
    """x [T, K], its rows `stride` bytes apart; delta [T, K] and mix [T, K] or none.

    Rows of mix are `mix_stride` bytes apart (0: one row for all). levels, of `bits` bits, factors and offsets are as
    above.
    """

    x: Address
    stride: Int
    tokens: Int
    columns: Int
    delta: Address
    mix: Address
    mix_stride: Int
    bits: Int
    levels: Address
    factors: Address
    offsets: Address


@kernel(QuantizeArgs)
def quantize(args: int, part: int, parts: int) -> None:
    """Round x, or x + delta · mix if there is a delta, to integers."""
    a = unpack(args, QuantizeArgs)
    K, delta = a.columns, a.delta
    G, level_bytes = (K + GROUP - 1) // GROUP, BYTES_8 if a.bits == 8 else BYTES_15
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
        group = ActivationGroup(x, d, m, a.levels + i * level_bytes, a.factors + i * 4, a.offsets + i * 4)
        if delta != 0 and a.bits == 8:
            _lerp_8(group)
        elif delta != 0:
            _lerp_15(group)
        elif a.bits == 8:
            _plain_8(group)
        else:
            _plain_15(group)
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
