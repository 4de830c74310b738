"""y[T, N] = x[T, K] · wᵀ on the GPU, weights in int8 or float. Numbers as on the CPU, fragments as in docs/cuda.md.

int8: x is rounded to levels (`cuda_levels`), sums of a group are exact integers. One token is a matter of reading the
weights (dp4a), many of multiplying (tensor cores). A launch does all products of one `linear`.
"""

import functools

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import (
    Kernel,
    cuda,
    dp4a,
    f32,
    float_of,
    function,
    half,
    i8,
    i16,
    i32,
    i64,
    kernel,
    products,
    put_f32,
    put_i16,
    put_i32,
    types,
    words,
)  # fmt: skip
from rwkv_cli.kernels.cuda.device.elementwise import activate, stored_float
from rwkv_cli.kernels.cuda.device.levels import FACTOR_BYTES, put_levels

PRODUCT = 15
"""Numbers, int64, in a row of the table of products: weights, scales, strips, groups, levels, factors, unit (bits),
bias (0: none), activation, whether to add, y, its stride, N; of one token also levels and factors of y (0: none)."""
GROUP_BYTES, SCALE_BYTES = 512, 32
"""A fragment, 16 rows × 32 columns of weights; its scales."""
_MOST_WARPS, _FEW_STRIPS = 16, 512
SHAPES = ((1, 1, 8, 4), (1, 4, 8, 2), (1, 8, 8, 2), (2, 8, 4, 3))
"""Of `matmul`: strips and tiles of 8 tokens that a block has, warps that share its groups, blocks at a time."""
REPACK_THREADS = 256
SIDE = 16
"""Rows and tokens of a block of `matmul_float`."""
_SQUARE = (SIDE, SIDE + 1)
_VECTOR_THREADS = 2 * 32 * _MOST_WARPS
_PAIRS = (2, _VECTOR_THREADS)


@kernel("iiiii", REPACK_THREADS)
def repack(source, width, out, strips, groups):  # type: ignore[no-untyped-def]
    """Stored int8 tiles (width 0: [S, K/4, 16, 4]) or columns ([N/width, K, width]) to fragments, 16 bytes a lane.

    Word i of lane 4g + t: row g + 8 (i mod 2), columns 4 (t + 4 (i div 2)) to 3 more. A thread a word, in turns.
    """
    total = strips * groups * 128
    for at in range(cuda.grid(1), total, cuda.gridsize(1)):
        i, lane, block = at % 4, at // 4 % 32, at // 128
        strip, quad = block // groups, block % groups * 8 + lane % 4 + i // 2 * 4
        row = lane // 4 + i % 2 * 8
        if width == 0:
            word = np.int64(i32(source + 4 * ((strip * groups * 8 + quad) * 16 + row)))
        else:
            n = strip * 16 + row
            first = source + (n // width * groups * 8 + quad) * 4 * width + n % width
            word = np.int64(i8(first) & 255)
            for k in range(1, 4):
                word |= np.int64(i8(first + k * width) & 255) << (8 * k)
        put_i32(out + 4 * at, word)


@kernel("iiiii", REPACK_THREADS)
def repack_scales(source, width, out, strips, groups):  # type: ignore[no-untyped-def]
    """Their float16 scales [N/width, K/32, width] (of tiles: width 16) to [strips, groups, 8, 2]: rows g and g + 8."""
    for at in range(cuda.grid(1), strips * groups * 16, cuda.gridsize(1)):
        block = at // 16
        n = block // groups * 16 + at // 2 % 8 + at % 2 * 8
        put_i16(out + 2 * at, i16(source + 2 * ((n // width * groups + block % groups) * width + n % width)))


@function
def _finish(row, total, t, n):  # type: ignore[no-untyped-def]
    """Put output (t, n) of the product whose facts are at `row`, from its sum without the weights' unit; return it."""
    y = total * float_of(i64(row + 48))
    bias = i64(row + 56)
    if bias != 0:
        y += f32(bias + 4 * n)
    y = activate(y, i64(row + 64))
    at = i64(row + 80) + 4 * (i64(row + 88) * t + n)
    if i64(row + 72) != 0:
        y += f32(at)
    put_f32(at, y)
    return y


@function
def _dots(w, x):  # type: ignore[no-untyped-def]
    """Of a lane's 8 columns: the sums of rows g and g + 8 with the one token's levels."""
    high = dp4a(w[2], x[1], dp4a(w[0], x[0], 0))
    high_8 = dp4a(w[3], x[1], dp4a(w[1], x[0], 0))
    return dp4a(w[2], x[3], dp4a(w[0], x[2], high * 256)), dp4a(w[3], x[3], dp4a(w[1], x[2], high_8 * 256))


@kernel("i", _VECTOR_THREADS)
def matvec(table):  # type: ignore[no-untyped-def]
    """All products with one token. A block has two strips, half of its warps each, which share the groups.

    So its outputs are a group of what reads them, and their levels can be put here. Blocks: (pairs, products).
    """
    sums = cuda.shared.array(_PAIRS, types.float32)
    outputs = cuda.shared.array(32, types.float32)
    row = table + 8 * PRODUCT * np.int64(cuda.blockIdx.y)
    pair, groups, tid = np.int64(cuda.blockIdx.x), i64(row + 24), np.int64(cuda.threadIdx.x)
    if 2 * pair >= i64(row + 16):
        return
    lane, warps = tid % 32, np.int64(cuda.blockDim.x // 64)
    half_of_block = 1 if tid >= 32 * warps else 0
    strip = 2 * pair + half_of_block
    w = i64(row) + GROUP_BYTES * strip * groups + 16 * lane
    s = i64(row + 8) + SCALE_BYTES * strip * groups + lane // 4 * 4
    x, f = i64(row + 32) + lane % 4 * 16, i64(row + 40)
    a, a_8 = np.float32(0), np.float32(0)
    g = tid // 32 - warps * half_of_block
    if strip >= i64(row + 16):  # of an odd number the last block has one
        g = groups
    # four groups at a time, so that their loads are under way together
    while g + 3 * warps < groups:
        g1, g2, g3 = g + warps, g + 2 * warps, g + 3 * warps
        w0, w1, w2, w3 = (
            words(w + GROUP_BYTES * g), words(w + GROUP_BYTES * g1), words(w + GROUP_BYTES * g2),
            words(w + GROUP_BYTES * g3),
        )  # fmt: skip
        s0, s1, s2, s3 = (
            i32(s + SCALE_BYTES * g), i32(s + SCALE_BYTES * g1), i32(s + SCALE_BYTES * g2), i32(s + SCALE_BYTES * g3)
        )  # fmt: skip
        f0, f1, f2, f3 = (
            f32(f + FACTOR_BYTES * g), f32(f + FACTOR_BYTES * g1), f32(f + FACTOR_BYTES * g2),
            f32(f + FACTOR_BYTES * g3),
        )  # fmt: skip
        p, p_8 = _dots(w0, words(x + GROUP_BYTES * g))
        a, a_8 = a + np.float32(p) * (half(s0) * f0), a_8 + np.float32(p_8) * (half(s0 >> 16) * f0)
        p, p_8 = _dots(w1, words(x + GROUP_BYTES * g1))
        a, a_8 = a + np.float32(p) * (half(s1) * f1), a_8 + np.float32(p_8) * (half(s1 >> 16) * f1)
        p, p_8 = _dots(w2, words(x + GROUP_BYTES * g2))
        a, a_8 = a + np.float32(p) * (half(s2) * f2), a_8 + np.float32(p_8) * (half(s2 >> 16) * f2)
        p, p_8 = _dots(w3, words(x + GROUP_BYTES * g3))
        a, a_8 = a + np.float32(p) * (half(s3) * f3), a_8 + np.float32(p_8) * (half(s3 >> 16) * f3)
        g += 4 * warps
    while g < groups:
        scale, factor = i32(s + SCALE_BYTES * g), f32(f + FACTOR_BYTES * g)
        p, p_8 = _dots(words(w + GROUP_BYTES * g), words(x + GROUP_BYTES * g))
        a, a_8 = a + np.float32(p) * (half(scale) * factor), a_8 + np.float32(p_8) * (half(scale >> 16) * factor)
        g += warps
    sums[0, tid], sums[1, tid] = a, a_8
    cuda.syncthreads()
    if tid < 32:
        n, first = 32 * pair + tid, tid // 16 * warps
        outputs[tid] = np.float32(0)
        if n < i64(row + 96):
            total = np.float32(0)
            for warp in range(first, first + warps):
                for t in range(4):
                    total += sums[tid // 8 % 2, 32 * warp + tid % 8 * 4 + t]
            outputs[tid] = _finish(row, total, 0, n)
    cuda.syncthreads()
    levels = i64(row + 104)
    if levels != 0 and tid < 8:
        put_levels(outputs, 0, tid, levels, i64(row + 112), pair, 0)


def warps(strips: int) -> int:
    """How many should share a strip's groups in `matvec`: of few strips more, so that enough loads are under way."""
    return _MOST_WARPS if strips <= _FEW_STRIPS else _MOST_WARPS // 2


@functools.cache
def matmul(STRIPS: int, COLUMNS: int, WARPS: int, BLOCKS: int) -> Kernel:
    """The kernel whose blocks have STRIPS strips of weights, COLUMNS tiles of 8 tokens and at most WARPS warps."""
    COUNT = STRIPS * COLUMNS * 4
    ALL, WORDS, SCALES = WARPS * COUNT * 32, (STRIPS, 4), (STRIPS, 2)

    @kernel("ii", 32 * WARPS, BLOCKS, f"matmul {STRIPS}×{COLUMNS}")
    def matmul(table, T):  # type: ignore[no-untyped-def]
        """All products with T tokens; a block's warps share the groups. Blocks: (strips, tiles, products)."""
        sums = cuda.shared.array(ALL, types.float32)
        own = cuda.local.array(COUNT, types.float32)
        weight = cuda.local.array(WORDS, types.int32)
        scale = cuda.local.array(SCALES, types.float32)
        place = cuda.local.array(STRIPS, types.int64)
        row = table + 8 * PRODUCT * np.int64(cuda.blockIdx.z)
        first, strips, groups = STRIPS * np.int64(cuda.blockIdx.x), i64(row + 16), i64(row + 24)
        if first >= strips:
            return
        tile, tid = COLUMNS * np.int64(cuda.blockIdx.y), np.int64(cuda.threadIdx.x)
        lane, warp, warps = tid % 32, tid // 32, np.int64(cuda.blockDim.x // 32)
        for i in range(COUNT):
            own[i] = np.float32(0)
        for i in range(STRIPS):
            place[i] = min(first + i, strips - 1) * groups  # beyond the last strip that one again, and not put
        levels, factors = i64(row + 32) + 16 * lane, i64(row + 40) + lane % 4 * 8
        values, scales = i64(row) + 16 * lane, i64(row + 8) + lane // 4 * 4
        for g in range(warp, groups, warps):
            for i in range(STRIPS):
                loaded = words(values + GROUP_BYTES * (place[i] + g))
                weight[i, 0], weight[i, 1], weight[i, 2], weight[i, 3] = loaded[0], loaded[1], loaded[2], loaded[3]
                two = i32(scales + SCALE_BYTES * (place[i] + g))
                scale[i, 0], scale[i, 1] = half(two), half(two >> 16)
            for c in range(COLUMNS):
                block = (tile + c) * groups + g
                x = words(levels + GROUP_BYTES * block)
                f0, f1 = f32(factors + FACTOR_BYTES * block), f32(factors + FACTOR_BYTES * block + 4)
                for i in range(STRIPS):
                    p0, p1, p2, p3 = products(
                        (weight[i, 0], weight[i, 1], weight[i, 2], weight[i, 3]), x,
                        values + GROUP_BYTES * (place[i] + g), levels + GROUP_BYTES * block, lane,
                    )  # fmt: skip
                    at = (i * COLUMNS + c) * 4
                    own[at] += np.float32(p0) * (scale[i, 0] * f0)
                    own[at + 1] += np.float32(p1) * (scale[i, 0] * f1)
                    own[at + 2] += np.float32(p2) * (scale[i, 1] * f0)
                    own[at + 3] += np.float32(p3) * (scale[i, 1] * f1)
        for i in range(COUNT):
            sums[(warp * COUNT + i) * 32 + lane] = own[i]
        cuda.syncthreads()
        for e in range(tid, COUNT * 32, 32 * warps):
            i, owner = e // 32, e % 32
            total = sums[e]
            for other in range(1, warps):
                total += sums[other * COUNT * 32 + e]
            n = 16 * (first + i // (4 * COLUMNS)) + owner // 4 + i % 4 // 2 * 8
            t = 8 * (tile + i // 4 % COLUMNS) + owner % 4 * 2 + i % 2
            if n < i64(row + 96) and t < T:
                _finish(row, total, t, n)

    return matmul


@kernel("iiiiiiiiiiii", SIDE * SIDE)
def matmul_float(x, x_stride, weight, kind, bias, activation, add, y, y_stride, T, N, K):  # type: ignore[no-untyped-def]
    """activation(x · wᵀ + bias), w [N, K] of FLOATS[kind]; `add`: added to y. Blocks of 16 × 16: (N, T)."""
    left = cuda.shared.array(_SQUARE, types.float32)
    right = cuda.shared.array(_SQUARE, types.float32)
    i, j = np.int64(cuda.threadIdx.x), np.int64(cuda.threadIdx.y)
    n, t = SIDE * np.int64(cuda.blockIdx.x) + i, SIDE * np.int64(cuda.blockIdx.y) + j
    size, total = 4 if kind == 0 else 2, np.float32(0)
    for k in range(0, K, SIDE):
        # neighbouring threads read neighbouring columns, of x as of the weight
        row = SIDE * np.int64(cuda.blockIdx.x) + j
        left[j, i] = f32(x + 4 * (x_stride * t + k + i)) if t < T and k + i < K else np.float32(0)
        right[j, i] = stored_float(weight + size * (K * row + k + i), kind) if row < N and k + i < K else np.float32(0)
        cuda.syncthreads()
        for at in range(SIDE):
            total += left[j, at] * right[i, at]
        cuda.syncthreads()
    if n < N and t < T:
        if bias != 0:
            total += f32(bias + 4 * n)
        total = activate(total, activation)
        out = y + 4 * (y_stride * t + n)
        if add != 0:
            total += f32(out)
        put_f32(out, total)
