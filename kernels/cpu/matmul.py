"""y[T, N] = x[T, K] · wᵀ for weights in int8 tiles and in float. The layouts are in docs/format.md.

int8: x is rounded (see `rounding`), and sums are exact integers. One token or many, VNNI or portable: the numbers are
the same but for float32 rounding.
"""

from typing import Any, NamedTuple

import numpy as np

from rwkv_cli.kernels.cpu.args import F32, F32_2, U16_2, U32_2, Address, Int, unpack
from rwkv_cli.kernels.cpu.compile import FIXED_ORDER, function, kernel
from rwkv_cli.kernels.cpu.elementwise import activate, address_of, span, widen
from rwkv_cli.kernels.cpu.llvm.int8_dot import STRIP, LevelGroup, WeightGroup, groups_step
from rwkv_cli.kernels.cpu.llvm.levels import CACHE_LINE, prefetch
from rwkv_cli.kernels.cpu.rounding import BYTES_8, BYTES_15, VNNI
from rwkv_cli.numbers import GROUP

_STRIPS = 2 if VNNI else 1
_MANY, _SOME, _TWO = 6, 4, 2
"""Strips and tokens that are multiplied together. The integer sums of the most fit into registers."""
GROUP_BYTES = STRIP * GROUP
"""A strip's weights in one group of 32 columns."""
_SCALE_BYTES = STRIP * 2
"""Bytes of their scales, if these are float16."""
_BLOCK_BYTES = 1 << 18
"""Activations that stay in a core's cache while weights come by."""
_FAR = 2048
"""How many bytes ahead the product of one token asks for."""


class Activations(NamedTuple):
    """Rounded activations of T tokens: addresses."""

    levels: int
    factors: int
    offsets: int
    tokens: int


class Strips(NamedTuple):
    """Some strips of tiles: addresses of weights and scales, how many strips and groups, and the tensor's unit."""

    values: int
    scales: int
    strips: int
    groups: int
    unit: float


class TilesArgs(NamedTuple):
    """values [S, K/4, 16, 4], scales [S, K/32, 16]; y [T, S·16]; bias [1, N] or none.

    A part is `strips_per_part` strips with all tokens.
    """

    values: Address
    scales: Address
    strips: Int
    groups: Int
    unit: F32
    levels: Address
    factors: Address
    offsets: Address
    tokens: Int
    y: F32_2
    bias: F32_2
    add: Int
    activation: Int
    strips_per_part: Int


class Ending(NamedTuple):
    """The end of a product: its first column in y, whether it is added there, and its activation by number."""

    column: int
    add: int
    activation: int


@function()
def _together(tokens):
    """How many of some tokens are multiplied together."""
    return _MANY if tokens >= _MANY else _SOME if tokens >= _SOME else _TWO if tokens >= _TWO else 1


@function()
def start(sums, y, bias, add):
    """sums = y if `add`, else the bias if there is one, else 0."""
    for i in range(len(sums)):
        sums[i] = y[i] if add else np.float32(0)
    if len(bias) and not add:
        for i in range(min(len(sums), len(bias))):
            sums[i] = bias[i]


def multiplier(bits: int, halves: bool) -> Any:
    """The function that multiplies activations of some bits by strips.

    Their scales are float16 if they are `halves`, and float32 if not.
    """
    many, some, two = (groups_step(_STRIPS, tokens, VNNI, bits, halves) for tokens in (_MANY, _SOME, _TWO))
    single = groups_step(1, 1, VNNI, bits, halves)
    scale_bytes = _SCALE_BYTES if halves else 2 * _SCALE_BYTES
    level_bytes = BYTES_8 if bits == 8 else BYTES_15

    @function(FIXED_ORDER, f"multiply_{bits}_{'halves' if halves else 'floats'}")
    def multiply(w, x, y, bias, ending):
        """The product of x (Activations) and w (Strips) to some columns of y [T, N]; bias [1, N] or none."""
        G, T = w.groups, x.tokens
        w_strip, scale_strip = G * GROUP_BYTES, G * scale_bytes
        level_token, row, y_row = G * level_bytes, G * 4, _STRIPS * STRIP * 4
        sums = np.zeros((_MANY, _STRIPS * STRIP), np.float32)
        flat, out = sums.reshape(-1), address_of(sums)
        together = max(_MANY, _BLOCK_BYTES // level_token // _MANY * _MANY)
        for begin in range(0, T, together):
            stop = min(begin + together, T)
            for strip in range(0, w.strips, _STRIPS):
                strips = min(_STRIPS, w.strips - strip)
                here = slice(ending.column + strip * STRIP, ending.column + (strip + strips) * STRIP)
                first_bias = bias[0, here] if len(bias) else y[0, :0]
                t = begin
                while t < stop:
                    tokens = _together(stop - t) if strips == _STRIPS else 1
                    for i in range(tokens):
                        start(sums[i, : strips * STRIP], y[t + i, here], first_bias, ending.add)
                    values, scales = w.values + strip * w_strip, w.scales + strip * scale_strip
                    levels, factors, offsets = x.levels + t * level_token, x.factors + t * row, x.offsets + t * row
                    weights = WeightGroup(values, w_strip, scales, scale_strip, w.unit)
                    group = LevelGroup(levels, level_token, factors, offsets, row)
                    if tokens == _MANY:
                        many(weights, group, G, out, y_row)
                    elif tokens == _SOME:
                        some(weights, group, G, out, y_row)
                    elif tokens == _TWO:
                        two(weights, group, G, out, y_row)
                    else:
                        for s in range(strips):
                            for g in range(G):
                                at = values + s * w_strip + g * GROUP_BYTES
                                for i in range(0, GROUP_BYTES, CACHE_LINE):
                                    prefetch(at + i + _FAR)
                                weights = WeightGroup(at, 0, scales + s * scale_strip + g * scale_bytes, 0, w.unit)
                                group = LevelGroup(levels + g * level_bytes, 0, factors + g * 4, offsets + g * 4, 0)
                                single(weights, group, 1, out + s * STRIP * 4, 0)
                    if ending.activation:
                        activate(flat[: tokens * _STRIPS * STRIP], ending.activation)
                    for i in range(tokens):
                        done, yt = sums[i, : strips * STRIP], y[t + i, here]
                        for j in range(len(done)):
                            yt[j] = done[j]
                    t += tokens
        # the sums must live until here, and their address alone does not keep them
        sums[0, 0] = 0

    return multiply


_multiply = multiplier(15, halves=True)


@kernel(TilesArgs, FIXED_ORDER)
def tiles(args: int, part: int, parts: int) -> None:  # noqa: ARG001
    """y = activation(x · wᵀ + bias), or y += x · wᵀ with `add`."""
    a = unpack(args, TilesArgs)
    first, last = part * a.strips_per_part, min((part + 1) * a.strips_per_part, a.strips)
    values, scales = a.values + first * a.groups * GROUP_BYTES, a.scales + first * a.groups * _SCALE_BYTES
    w = Strips(values, scales, last - first, a.groups, a.unit)
    x = Activations(a.levels, a.factors, a.offsets, a.tokens)
    _multiply(w, x, a.y, a.bias, Ending(first * STRIP, a.add, a.activation))


class FloatsArgs(NamedTuple):
    """Weights [N, K] of 16 or of 32 bits a number, whichever is there; x [T, K], y [T, N]."""

    half: U16_2
    whole: U32_2
    dtype: Int
    x: F32_2
    y: F32_2


@kernel(FloatsArgs)
def floats(args: int, part: int, parts: int) -> None:
    """y = x · wᵀ for weights of FLOAT_DTYPES[dtype], 4 rows of weights at a time."""
    a = unpack(args, FloatsArgs)
    x, y, kind = a.x, a.y, a.dtype
    T, K = x.shape
    N = y.shape[1]
    begin, end = span(part, parts, (N + 3) // 4)
    rows = np.zeros((4, K), np.float32)
    for n in range(begin * 4, end * 4, 4):
        for i in range(min(4, N - n)):
            if kind == 0:
                widen(a.whole[n + i], kind, rows[i])
            else:
                widen(a.half[n + i], kind, rows[i])
        for t in range(T):
            s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for k in range(K):
                s0 += rows[0, k] * x[t, k]
                s1 += rows[1, k] * x[t, k]
                s2 += rows[2, k] * x[t, k]
                s3 += rows[3, k] * x[t, k]
            y[t, n] = s0
            if n + 1 < N:
                y[t, n + 1] = s1
            if n + 2 < N:
                y[t, n + 2] = s2
            if n + 3 < N:
                y[t, n + 3] = s3
