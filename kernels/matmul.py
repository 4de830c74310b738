"""y[T, N] = x[T, K] · wᵀ for weights in int8 (tiles or columns) and float. Source of the layouts: docs/format.md.

int8: x is rounded to int16 in the weights' own groups of 32 (about 15 bits), sums are exact integers. One token or
many, VNNI or portable: the same numbers but for float32 rounding.
"""

import numpy as np
from numba import prange

from rwkv_cli.kernels.bits import float_of
from rwkv_cli.kernels.group import group_step, pair_step, prefetch, quantize_step
from rwkv_cli.kernels.jit import FIXED_ORDER, has_vnni, kernel

GROUP = 32
_LEVELS = 32512  # 127 · 256: both byte planes of any level fit in int8
VNNI = has_vnni()
_STRIPS, _TOKENS = (2, 6) if VNNI else (1, 4)

_AHEAD = 2
"""Groups of 32 rows that a sparse product asks for in advance."""

_block = group_step(_STRIPS, _TOKENS, VNNI)
_single = group_step(1, 1, VNNI)
_pair = pair_step(VNNI)
_quantize_group = quantize_step(VNNI, _LEVELS)


@kernel()
def _quantize(x, unit, first, last, planes, factors, offsets):  # type: ignore[no-untyped-def]
    """Tokens `first` to `last` of `quantize_activations`."""
    K, Kp = x.shape[1], planes.shape[2]
    size, last_plane = planes.itemsize, planes.shape[1] - 1
    tail = np.zeros(GROUP, np.float32)
    for t in range(first, last):
        row, plane = x.ctypes.data + t * x.strides[0], planes.ctypes.data + t * planes.strides[0]
        f, o = factors.ctypes.data + t * factors.strides[0], offsets.ctypes.data + t * offsets.strides[0]
        for g in range(Kp // GROUP):
            source = row + g * GROUP * 4
            if (g + 1) * GROUP > K:
                for k in range(g * GROUP, K):
                    tail[k - g * GROUP] = x[t, k]
                source = tail.ctypes.data
            high = plane + g * GROUP * size
            _quantize_group(source, high, high + last_plane * planes.strides[1], f + g * 4, o + g * 4, unit)
    # the tail must live until here, and its address alone does not keep it
    tail[0] = 0


@kernel()
def quantize_one(x, unit, planes, factors, offsets):  # type: ignore[no-untyped-def]
    """`quantize_activations` on this thread: a few tokens are done before others would be awake."""
    _quantize(x, unit, 0, len(x), planes, factors, offsets)


@kernel(parallel=True)
def quantize_activations(x, unit, planes, factors, offsets, threads):  # type: ignore[no-untyped-def]
    """x [T, K] to `planes` (VNNI: int8 [T, 2, Kp], else int16 [T, 1, Kp]), `factors` and `offsets` [T, Kp/32].

    factor = scale of the group · unit. A NaN or infinity in a group makes its factor NaN, and so every output.
    """
    T = len(x)
    for part in prange(threads):
        _quantize(x, unit, part * T // threads, (part + 1) * T // threads, planes, factors, offsets)


@kernel()
def _pairs(values, scales, planes, factors, offsets, y, begin, end):  # type: ignore[no-untyped-def]
    """Pairs of strips `begin` to `end` of `tiles`."""
    S, G = values.shape[0], scales.shape[1]
    T = planes.shape[0]
    w, w_strip = values.ctypes.data, values.strides[0]
    sc, sc_strip = scales.ctypes.data, scales.strides[0]
    a, a_token, a_plane = planes.ctypes.data, planes.strides[0], planes.strides[1]
    a_group = GROUP * planes.itemsize
    f, f_token = factors.ctypes.data, factors.strides[0]
    o, o_token = offsets.ctypes.data, offsets.strides[0]
    out, out_token = y.ctypes.data, y.strides[0]
    blocks = T // _TOKENS * _TOKENS
    for pair in range(begin, end):
        first = pair * _STRIPS
        whole = first + _STRIPS <= S
        if whole:
            for t in range(0, blocks, _TOKENS):
                for g in range(G):
                    _block(
                        w + first * w_strip + g * 512, w_strip,
                        a + t * a_token + g * a_group, a_token, a_plane,
                        sc + first * sc_strip + g * 32, sc_strip,
                        f + t * f_token + g * 4, f_token, o + t * o_token + g * 4, o_token,
                        out + t * out_token + first * 64, out_token,
                    )  # fmt: skip
        for strip in range(first, min(first + _STRIPS, S)):
            for t in range(blocks if whole else 0, T):
                for g in range(G):
                    _single(
                        w + strip * w_strip + g * 512, w_strip,
                        a + t * a_token + g * a_group, a_token, a_plane,
                        sc + strip * sc_strip + g * 32, sc_strip,
                        f + t * f_token + g * 4, f_token, o + t * o_token + g * 4, o_token,
                        out + t * out_token + strip * 64, out_token,
                    )  # fmt: skip


@kernel()
def tiles_small(values, scales, planes, factors, offsets, y):  # type: ignore[no-untyped-def]
    """`tiles` on this thread, for matrices that are done before others would be awake."""
    _pairs(values, scales, planes, factors, offsets, y, 0, (values.shape[0] + _STRIPS - 1) // _STRIPS)


@kernel(parallel=True)
def tiles(values, scales, planes, factors, offsets, y, threads):  # type: ignore[no-untyped-def]
    """values [S, K/4, 16, 4], scales [S, K/32, 16] → y [T, S·16], added to what is there."""
    pairs = (values.shape[0] + _STRIPS - 1) // _STRIPS
    parts = min(threads * 4, pairs)
    for part in prange(parts):
        begin, end = part * pairs // parts, (part + 1) * pairs // parts
        _pairs(values, scales, planes, factors, offsets, y, begin, end)


@kernel(parallel=True, fastmath=FIXED_ORDER)
def columns_one(values, scales, planes, factors, y, threads):  # type: ignore[no-untyped-def]
    """values [B, K, W], scales [B, K/32, W], one token → y [1, B·W]. Reads only the rows whose input is not zero.

    Rows go in pairs, an odd last one of a group with a level of zero beside it.
    """
    B, K, W = values.shape
    G = K // GROUP
    # the rows of group g that are not zero, and levels of each two: used[g, :count[g]], levels[g, :count[g] / 2]
    used, levels = np.empty((G, GROUP), np.int64), np.empty((G, GROUP // 2), np.int64)
    count = np.zeros(G, np.int64)
    for g in range(G):
        n = 0
        for k in range(g * GROUP, (g + 1) * GROUP):
            q = np.int64(planes[0, 0, k])
            if VNNI:
                q = (q << 8) + np.int64(planes[0, 1, k])
            if q != 0:
                used[g, n] = k
                if n % 2:
                    levels[g, n // 2] |= q << 16
                else:
                    levels[g, n // 2] = q & 0xFFFF
                    used[g, n + 1] = k
                n += 1
        count[g] = (n + 1) // 2 * 2
    # a block is cut until every thread has as many pieces
    width = W
    while B * (W // width) % threads and width > 64:
        width //= 2
    pieces = B * (W // width)
    parts = min(threads, pieces)
    for part in prange(parts):
        total, group = np.empty(width, np.float32), np.empty(width, np.int32)
        address = group.ctypes.data
        for piece in range(part * pieces // parts, (part + 1) * pieces // parts):
            b, start = piece // (W // width), piece % (W // width) * width
            rows = values.ctypes.data + b * values.strides[0] + start
            total[:] = 0
            for g in range(G):
                # a factor that is NaN must reach the output though every activation beside it is zero
                if count[g] == 0 and factors[0, g] == 0:
                    continue
                # which rows come is not what a CPU's own prefetcher could guess
                if g + _AHEAD < G:
                    for n in range(count[g + _AHEAD]):
                        for i in range(0, width, 64):
                            prefetch(rows + used[g + _AHEAD, n] * W + i)
                group[:] = 0
                for n in range(0, count[g], 2):
                    first, second = rows + used[g, n] * W, rows + used[g, n + 1] * W
                    for i in range(0, width, 16):
                        _pair(first + i, second + i, levels[g, n // 2], address + i * 4)
                scale, factor = scales[b, g, start : start + width], factors[0, g]
                for i in range(width):
                    real = float_of(np.int32(scale[i]) << np.int32(13))
                    total[i] += np.float32(group[i]) * (real * factor)
            y[0, b * W + start : b * W + start + width] = total
        # the sums must live until here, and their address alone does not keep them
        group[0] = 0


@kernel(parallel=True)
def columns(values, scales, planes, factors, offsets, y):  # type: ignore[no-untyped-def]
    """The same for T tokens: a group of rows is put into tile order once and serves them all."""
    B, K, W = values.shape
    T = planes.shape[0]
    a, a_token, a_plane = planes.ctypes.data, planes.strides[0], planes.strides[1]
    a_group = GROUP * planes.itemsize
    sc = scales.ctypes.data
    f, f_token = factors.ctypes.data, factors.strides[0]
    o, o_token = offsets.ctypes.data, offsets.strides[0]
    out, out_token = y.ctypes.data, y.strides[0]
    G, strips = scales.shape[1], W // 16
    for piece in prange(B * strips):
        b, strip = piece // strips, piece % strips
        tile = np.empty((G, GROUP // 4, 16, 4), np.int8)
        for k in range(K):
            for i in range(16):
                tile[k // GROUP, k % GROUP // 4, i, k % 4] = values[b, k, strip * 16 + i]
        w = tile.ctypes.data
        for t in range(T):
            for g in range(G):
                _single(
                    w + g * 512, 0, a + t * a_token + g * a_group, a_token, a_plane,
                    sc + ((b * G + g) * W + strip * 16) * 2, 0,
                    f + t * f_token + g * 4, f_token, o + t * o_token + g * 4, o_token,
                    out + t * out_token + piece * 64, out_token,
                )  # fmt: skip
        # the tile must live until here, and its address alone does not keep it
        tile[0, 0, 0, 0] = 0


@kernel(parallel=True)
def floats(bits, kind, x, y, threads):  # type: ignore[no-untyped-def]
    """bits [N, K] (kind 0: float32, 1: bfloat16, 2: float16) → y [T, N], 4 rows at a time."""
    N, K = bits.shape
    T = x.shape[0]
    quads = (N + 3) // 4
    parts = min(threads * 4, quads)
    for part in prange(parts):
        rows = np.zeros((4, K), np.float32)
        raw = rows.view(np.uint32)
        for quad in range(part * quads // parts, (part + 1) * quads // parts):
            n = quad * 4
            for i in range(min(4, N - n)):
                for k in range(K):
                    if kind == 0:
                        rows[i, k] = bits[n + i, k]
                    elif kind == 1:
                        raw[i, k] = np.uint32(bits[n + i, k]) << np.uint32(16)
                    else:
                        h = np.uint32(bits[n + i, k])
                        raw[i, k] = (h & np.uint32(0x8000)) << np.uint32(16) | (h & np.uint32(0x7FFF)) << np.uint32(13)
                        rows[i, k] *= np.float32(2.0**112)
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
