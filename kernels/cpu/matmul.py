"""y[T, N] = x[T, K] · wᵀ for weights in int8 (tiles or columns) and float. Source of the layouts: docs/format.md.

int8: x is rounded to int16 in the weights' own groups of 32 (about 15 bits), sums are exact integers. One token or
many, VNNI or portable: the same numbers but for float32 rounding.

Rounded activations are `levels` (VNNI: int8 [T, Kp/32, 2, 32], else int16 [T, Kp/32, 1, 32]), `factors` and `offsets`
[T, Kp/32].
"""

import numpy as np

from rwkv_cli.kernels.cpu.args import unpack
from rwkv_cli.kernels.cpu.compile import FIXED_ORDER, function, has_vnni, kernel
from rwkv_cli.kernels.cpu.elementwise import activate, span, widen
from rwkv_cli.kernels.cpu.llvm.bits import float_at
from rwkv_cli.kernels.cpu.llvm.int8_dot import group_step, rows_step
from rwkv_cli.kernels.cpu.llvm.levels import interleave, prefetch, quantize_step

GROUP = 32
_LEVELS = 32512  # 127 · 256: both byte planes of any level fit in int8
VNNI = has_vnni()
PLANES, LEVEL = (2, np.dtype(np.int8)) if VNNI else (1, np.dtype(np.int16))
_LEVEL_BYTES = LEVEL.itemsize
_STRIPS, _TOKENS = (2, 6) if VNNI else (1, 2)
STRIPS = _STRIPS
"""Strips of 16 outputs that go together."""
_BLOCK_BYTES = 1 << 18
"""Of activations that stay in a core's cache while weights come by."""
_FAR = 2048
"""Bytes that one token's product asks for in advance."""
_AHEAD = 1
"""Groups of 32 rows that a sparse product asks for in advance."""
WIDTH = 128
"""Outputs that a sparse product sums in registers."""

_block = group_step(_STRIPS, _TOKENS, VNNI)
_single = group_step(1, 1, VNNI)
_quantize_group = quantize_step(VNNI, _LEVELS, False)
_quantize_lerp = quantize_step(VNNI, _LEVELS, True)
_sum_wide, _sum_narrow = rows_step(VNNI, WIDTH), rows_step(VNNI, 16)

QUANTIZE = "at int int int at at int at at at int"


@kernel(QUANTIZE)
def quantize(args, part):  # type: ignore[no-untyped-def]
    """x [T, K], rows `stride` apart, or if there is a delta x + delta · mix with mix [1 or T, K], to integers."""
    x, stride, T, K, delta, mix, mix_stride, levels, factors, offsets, parts = unpack(args, QUANTIZE)
    G = (K + GROUP - 1) // GROUP
    tail = np.zeros((3, GROUP), np.float32)
    begin, end = span(part, parts, T * G)
    t, g = begin // G, begin % G
    for i in range(begin, end):
        at = g * GROUP * 4
        a, d, m = x + t * stride + at, delta + t * K * 4 + at, mix + t * mix_stride + at
        if (g + 1) * GROUP > K:
            copy(a, tail[0], K - g * GROUP)
            if delta != 0:
                copy(d, tail[1], K - g * GROUP)
                copy(m, tail[2], K - g * GROUP)
            a, d, m = tail.ctypes.data, tail.ctypes.data + GROUP * 4, tail.ctypes.data + GROUP * 8
        out = levels + i * PLANES * GROUP * _LEVEL_BYTES
        if delta != 0:
            _quantize_lerp(a, d, m, out, factors + i * 4, offsets + i * 4)
        else:
            _quantize_group(a, 0, 0, out, factors + i * 4, offsets + i * 4)
        g += 1
        if g == G:
            t, g = t + 1, 0
    # the tail must live until here, and its address alone does not keep it
    tail[0, 0] = 0


@function()
def copy(address, out, n):  # type: ignore[no-untyped-def]
    """out[:n] = the n float32 at `address`."""
    for i in range(n):
        out[i] = float_at(address + i * 4)


TILES = "at at int int at at at int f32 f32.2 f32.2 int int int"


@kernel(TILES)
def tiles(args, part):  # type: ignore[no-untyped-def]
    """values [S, K/4, 16, 4], scales [S, K/32, 16] → y [T, S·16] = activation(y if `onto` else bias + …).

    A part is `strips` of them, all tokens.
    """
    w, sc, S, G, a, f, o, T, unit, y, bias, onto, activation, strips = unpack(args, TILES)
    first, last = part * strips, min((part + 1) * strips, S)
    w, sc, column = w + first * G * 512, sc + first * G * 32, first * 16
    _multiply(w, sc, last - first, G, a, f, o, T, unit, y, column, bias, onto, activation)


@function()
def _start(sums, y, bias, onto):  # type: ignore[no-untyped-def]
    """sums = y if `onto`, else the bias if there is one, else 0."""
    for i in range(len(sums)):
        sums[i] = y[i] if onto else np.float32(0)
    if len(bias) and not onto:
        for i in range(min(len(sums), len(bias))):
            sums[i] = bias[i]


@function()
def _multiply(w, sc, S, G, a, f, o, T, unit, y, column, bias, onto, activation):  # type: ignore[no-untyped-def]
    """The product with S strips at address w to y from `column` on."""
    w_strip, sc_strip = G * 512, G * 32
    a_group = PLANES * GROUP * _LEVEL_BYTES
    a_token, row = G * a_group, G * 4
    sums = np.zeros((_TOKENS, _STRIPS * 16), np.float32)
    flat, out = sums.reshape(-1), sums.ctypes.data
    block = max(_TOKENS, _BLOCK_BYTES // a_token // _TOKENS * _TOKENS)
    for start in range(0, T, block):
        stop = min(start + block, T)
        for strip in range(0, S, _STRIPS):
            strips = min(_STRIPS, S - strip)
            here = slice(column + strip * 16, column + (strip + strips) * 16)
            first_bias = bias[0, here] if len(bias) else y[0, :0]
            t = start
            while t < stop:
                tokens = _TOKENS if t + _TOKENS <= stop and strips == _STRIPS else 1
                for i in range(tokens):
                    _start(sums[i, : strips * 16], y[t + i, here], first_bias, onto)
                weights, scales = w + strip * w_strip, sc + strip * sc_strip
                levels, factors, offsets = a + t * a_token, f + t * row, o + t * row
                if tokens == _TOKENS:
                    for g in range(G):
                        _block(
                            weights + g * 512, w_strip, levels + g * a_group, a_token, scales + g * 32, sc_strip,
                            factors + g * 4, row, offsets + g * 4, row, out, _STRIPS * 64, unit,
                        )  # fmt: skip
                else:
                    for s in range(strips):
                        for g in range(G):
                            for i in range(0, 512, 64):
                                prefetch(weights + s * w_strip + g * 512 + i + _FAR)
                            _single(
                                weights + s * w_strip + g * 512, 0, levels + g * a_group, 0,
                                scales + s * sc_strip + g * 32, 0, factors + g * 4, 0, offsets + g * 4, 0, out + s * 64,
                                0, unit,
                            )  # fmt: skip
                if activation:
                    activate(flat[: tokens * _STRIPS * 16], activation)
                for i in range(tokens):
                    done, yt = sums[i, : strips * 16], y[t + i, here]
                    for j in range(len(done)):
                        yt[j] = done[j]
                t += tokens
    # the sums must live until here, and their address alone does not keep them
    sums[0, 0] = 0


COLUMNS = "i8.3 u16.3 at at at int f32 f32.2 int"


@kernel(COLUMNS)
def columns(args, part):  # type: ignore[no-untyped-def]
    """values [B, K, W], scales [B, K/32, W], T tokens → y [T, B·W], added if `onto`. A part is two strips of 16
    outputs, or one where W is no more, which are put into tile order once and serve all tokens."""
    values, scales, a, f, o, T, unit, y, onto = unpack(args, COLUMNS)
    K, W, G = values.shape[1], values.shape[2], scales.shape[1]
    strips = min(2, W // 16)
    b, start = part * strips * 16 // W, part * strips * 16 % W
    tile, scale = np.empty((strips, G * 512), np.int8), np.empty((strips, G, 16), np.uint16)
    for s in range(strips):
        source = values.ctypes.data + b * K * W + start + s * 16
        for k in range(0, K, 4):
            interleave(source + k * W, W, tile.ctypes.data + s * G * 512 + k * 16)
        for g in range(G):
            for i in range(16):
                scale[s, g, i] = scales[b, g, start + s * 16 + i]
    w, sc = tile.ctypes.data, scale.ctypes.data
    _multiply(w, sc, strips, G, a, f, o, T, unit, y, b * W + start, y[:0], onto, 0)
    # these must live until here, and their addresses alone do not keep them
    tile[0, 0], scale[0, 0, 0] = 0, 0


PICK = "i8.4 i16.4 i64.2 i16.2 i64.1 int"


@kernel(PICK)
def pick(args, part):  # type: ignore[no-untyped-def]
    """Of one token's levels (one of the two forms is given) the levels that are not 0: group g has `count[g]` of
    them, rows[g, n] and levels[g, n]. An odd last one gets a level of 0 beside it."""
    bytes_, words, rows, levels, count, parts = unpack(args, PICK)
    begin, end = span(part, parts, len(count))
    for g in range(begin, end):
        n = 0
        for i in range(GROUP):
            if VNNI:
                q = (np.int64(bytes_[0, g, 0, i]) << 8) + np.int64(bytes_[0, g, 1, i])
            else:
                q = np.int64(words[0, g, 0, i])
            rows[g, n], levels[g, n] = g * GROUP + i, q
            n += q != 0
        if n % 2:
            rows[g, n], levels[g, n] = rows[g, n - 1], 0
        count[g] = (n + 1) // 2 * 2


COLUMNS_ONE = "i8.3 u16.3 i64.2 i16.2 i64.1 f32.2 f32 f32.2 int int"


@kernel(COLUMNS_ONE, FIXED_ORDER)
def columns_one(args, part):  # type: ignore[no-untyped-def]
    """`columns` for one token: reads only the rows whose input is not zero. A part is `width` outputs of a block."""
    values, scales, rows, levels, count, factors, unit, y, onto, width = unpack(args, COLUMNS_ONE)
    K, W, G = values.shape[1], values.shape[2], scales.shape[1]
    b, start = part * width // W, part * width % W
    total, here = np.empty(width, np.float32), b * W + start
    for i in range(width):
        total[i] = y[0, here + i] if onto else np.float32(0)
    source, scale = values.ctypes.data + b * K * W + start, scales.ctypes.data + (b * G * W + start) * 2
    for g in range(G):
        # which rows come is not what a CPU's own prefetcher could guess
        if g + _AHEAD < G:
            for n in range(count[g + _AHEAD]):
                for i in range(0, width, 64):
                    prefetch(source + rows[g + _AHEAD, n] * W + i)
        factor = factors[0, g]
        if count[g] == 0:
            # a factor that is NaN must reach the output though every activation beside it is zero
            if factor != factor:
                total[:] = np.nan
            continue
        row, level = rows.ctypes.data + g * GROUP * 8, levels.ctypes.data + g * GROUP * 2
        at = 0
        while at < width:
            place = total.ctypes.data + at * 4
            if at + WIDTH <= width:
                _sum_wide(source + at, row, level, scale + (g * W + at) * 2, place, W, count[g], factor, unit)
                at += WIDTH
            else:
                _sum_narrow(source + at, row, level, scale + (g * W + at) * 2, place, W, count[g], factor, unit)
                at += 16
    y[0, here : here + width] = total
    # the sums must live until here, and their address alone does not keep them
    total[0] = 0


FLOATS = "u16.2 u32.2 int f32.2 f32.2 int"


@kernel(FLOATS)
def floats(args, part):  # type: ignore[no-untyped-def]
    """Weights [N, K] of 16 or 32 bits a number, whichever is given, DTYPES[kind] → y [T, N], 4 rows at a time."""
    half, whole, kind, x, y, parts = unpack(args, FLOATS)
    T, K = x.shape
    N = y.shape[1]
    begin, end = span(part, parts, (N + 3) // 4)
    rows = np.zeros((4, K), np.float32)
    for n in range(begin * 4, end * 4, 4):
        for i in range(min(4, N - n)):
            if kind == 0:
                widen(whole[n + i], kind, rows[i])
            else:
                widen(half[n + i], kind, rows[i])
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
