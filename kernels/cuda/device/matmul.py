"""y = x · wᵀ on the GPU: x [T, K], w [N, K] in int8 or codes of 4, 5 or 6 bits, y [T, N]. docs/cuda.md has the order.

x is rounded to levels (`levels`), and sums of a group are exact integers. One token is a matter of reading the weights
(dp4a), many of multiplying (tensor cores). One launch does all products of a `Linear` with weights of as many bits.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from rwkv_cli.kernels.cuda.device.codes import (
    STRIP,
    both_scales,
    fragment_bytes,
    levels_of,
    scale_bytes,
    scales_at,
    weights_at,
)
from rwkv_cli.kernels.cuda.device.compile import (
    Address,
    Float,
    Int,
    Kernel,
    cuda,
    dp4a,
    f32,
    float_of,
    function,
    i64,
    kernel,
    let_next_begin,
    prefetch,
    products,
    quad_sum,
    types,
    wait_for_previous,
    words,
)
from rwkv_cli.kernels.cuda.device.levels import FACTOR_BYTES, LEVEL_BYTES, TOKENS, levels_at, put_group
from rwkv_cli.kernels.cuda.device.outputs import OutputFields, put_output


class ProductRow(NamedTuple):
    """A row of the table that `matvec` and `matmul` read. From `bias` on it has `OutputFields`."""

    weights: Address
    scales: Address
    strips: Int
    groups: Int
    levels: Address
    factors: Address
    unit: Float
    rows: Address
    """A factor of each row of codes, float32; 0 for none."""
    bias: Address
    activation: Int
    add: Int
    y: Address
    y_stride: Int
    N: Int
    y_levels: Address
    """The place for levels of y, which `matvec` can put; 0 for none."""
    y_factors: Address


PRODUCT = ProductRow(*range(0, 8 * len(ProductRow._fields), 8))
"""The offset of each column in a row, in bytes."""
_PRODUCT_ROW_BYTES = 8 * len(PRODUCT)
assert ProductRow._fields[PRODUCT.bias // 8 : PRODUCT.y_levels // 8] == OutputFields._fields

_MOST_WARPS, _FEW_STRIPS = 16, 512
_VECTOR_THREADS = 2 * 32 * _MOST_WARPS
_PAIRS = (2, _VECTOR_THREADS // 4)


class Shape(NamedTuple):
    """The shape of a block of `matmul`."""

    strips: int
    tiles: int
    """Tiles of 8 tokens."""
    warps: int
    """Most warps, which share the groups."""
    blocks: int
    """Blocks that a multiprocessor should hold."""

    @property
    def tokens(self) -> int:
        return TOKENS * self.tiles


SHAPES = (Shape(1, 1, 8, 4), Shape(1, 4, 8, 2), Shape(1, 8, 8, 2))
"""Each serves as many tokens as a block has; `matmul_wide` serves all beyond."""
_WIDE_STRIPS, _WIDE_TILES, _WARPS_DOWN, _WARPS_ACROSS = 4, 4, 2, 2
"""What a warp of `matmul_wide` has, and how its block's warps lie."""
WIDE_STRIPS, WIDE_TOKENS = _WIDE_STRIPS * _WARPS_DOWN, TOKENS * _WIDE_TILES * _WARPS_ACROSS
"""The shape of a block of `matmul_wide`."""
WIDE_THREADS = 32 * _WARPS_DOWN * _WARPS_ACROSS
_WIDE_SUMS = 4 * _WIDE_STRIPS * _WIDE_TILES
_WIDE_WEIGHTS, _WIDE_LEVELS, _WIDE_FACTORS = (2, 4 * _WIDE_STRIPS), (2, 4 * _WIDE_TILES), (2, 2 * _WIDE_TILES)
_WIDE_ALL = WIDE_THREADS * _WIDE_SUMS
_WIDE_SCALES = (2, _WIDE_STRIPS)


@function
def _finish(row: Address, total: Float, t: Int, n: Int) -> Any:
    """Put output (t, n) of the product that `row` describes, and return it. `total` lacks what the row's own factor."""
    y = total * float_of(i64(row + PRODUCT.unit))
    rows = i64(row + PRODUCT.rows)
    if rows != 0:
        y *= f32(rows + 4 * n)
    return put_output(row + PRODUCT.bias, y, t, n)


@function
def _dots(weights: Any, levels: Any) -> Any:
    """The sums of rows g and g + 8 over a lane's 8 columns with the one token's levels."""
    left, left_8, right, right_8 = weights
    high_left, high_right, low_left, low_right = levels
    high = dp4a(right, high_right, dp4a(left, high_left, 0))
    high_8 = dp4a(right_8, high_right, dp4a(left_8, high_left, 0))
    low = dp4a(right, low_right, dp4a(left, low_left, high * 256))
    return low, dp4a(right_8, low_right, dp4a(left_8, low_left, high_8 * 256))


@function
def _added(a: Float, a_8: Float, dots: Any, scales: Any, factor: Float) -> Any:
    """The sums a and a_8 of rows g and g + 8, with a group's `_dots` added."""
    dot, dot_8 = dots
    scale, scale_8 = scales
    return a + np.float32(dot) * (scale * factor), a_8 + np.float32(dot_8) * (scale_8 * factor)


@functools.cache
def matvec(bits: int) -> Kernel:
    """The kernel for one token and weights of so many bits."""
    BYTES, SCALE_BYTES = fragment_bytes(bits), scale_bytes(bits)

    @kernel(_VECTOR_THREADS, name=f"matvec {bits}")
    def matvec(table: Address) -> None:
        """All products of a table of `ProductRow` with one token. Blocks: (pairs of strips, products).

        Half of a block's warps have one strip, half the other, and they share the groups. So a block's outputs are a
        group of what reads them, and their levels can be put here.
        """
        let_next_begin()
        sums = cuda.shared.array(_PAIRS, types.float32)
        row = table + _PRODUCT_ROW_BYTES * np.int64(cuda.blockIdx.y)
        pair, groups, tid = np.int64(cuda.blockIdx.x), i64(row + PRODUCT.groups), np.int64(cuda.threadIdx.x)
        if 2 * pair >= i64(row + PRODUCT.strips):
            return
        lane, warps = tid % 32, np.int64(cuda.blockDim.x // 64)
        half_of_block = 1 if tid >= 32 * warps else 0
        strip = 2 * pair + half_of_block
        w = i64(row + PRODUCT.weights) + BYTES * strip * groups
        s = i64(row + PRODUCT.scales) + SCALE_BYTES * strip * groups
        x, f = i64(row + PRODUCT.levels) + lane % 4 * 16, i64(row + PRODUCT.factors)
        a, a_8 = np.float32(0), np.float32(0)
        g = tid // 32 - warps * half_of_block
        if strip >= i64(row + PRODUCT.strips):  # the last block of an odd number has one
            g = groups
        # The first weights come while the launch before ends.
        for i in range(4):
            if lane % 8 == 0 and 16 * lane < BYTES and g + i * warps < groups:
                prefetch(w + BYTES * (g + i * warps) + 16 * lane)
        wait_for_previous()
        # Four groups at a time: their loads are under way together.
        while g + 3 * warps < groups:
            g1, g2, g3 = g + warps, g + 2 * warps, g + 3 * warps
            w0, w1 = weights_at(w + BYTES * g, lane, bits), weights_at(w + BYTES * g1, lane, bits)
            w2, w3 = weights_at(w + BYTES * g2, lane, bits), weights_at(w + BYTES * g3, lane, bits)
            s0, s1 = scales_at(s + SCALE_BYTES * g, lane // 4, bits), scales_at(s + SCALE_BYTES * g1, lane // 4, bits)
            s2, s3 = scales_at(s + SCALE_BYTES * g2, lane // 4, bits), scales_at(s + SCALE_BYTES * g3, lane // 4, bits)
            f0, f1 = f32(f + FACTOR_BYTES * g), f32(f + FACTOR_BYTES * g1)
            f2, f3 = f32(f + FACTOR_BYTES * g2), f32(f + FACTOR_BYTES * g3)
            a, a_8 = _added(a, a_8, _dots(levels_of(w0, bits), words(x + LEVEL_BYTES * g)), both_scales(s0, bits), f0)
            a, a_8 = _added(a, a_8, _dots(levels_of(w1, bits), words(x + LEVEL_BYTES * g1)), both_scales(s1, bits), f1)
            a, a_8 = _added(a, a_8, _dots(levels_of(w2, bits), words(x + LEVEL_BYTES * g2)), both_scales(s2, bits), f2)
            a, a_8 = _added(a, a_8, _dots(levels_of(w3, bits), words(x + LEVEL_BYTES * g3)), both_scales(s3, bits), f3)
            g += 4 * warps
        while g < groups:
            scales, factor = scales_at(s + SCALE_BYTES * g, lane // 4, bits), f32(f + FACTOR_BYTES * g)
            dots = _dots(levels_of(weights_at(w + BYTES * g, lane, bits), bits), words(x + LEVEL_BYTES * g))
            a, a_8 = _added(a, a_8, dots, both_scales(scales, bits), factor)
            g += warps
        a, a_8 = quad_sum(a), quad_sum(a_8)
        if lane % 4 == 0:
            sums[0, tid // 4], sums[1, tid // 4] = a, a_8
        cuda.syncthreads()
        out = np.float32(0)
        if tid < 32:
            n, first = 32 * pair + tid, tid // 16 * warps
            if n < i64(row + PRODUCT.N):
                total = np.float32(0)
                for warp in range(first, first + warps):
                    total += sums[tid // 8 % 2, 8 * warp + tid % 8]
                out = _finish(row, total, 0, n)
        levels = i64(row + PRODUCT.y_levels)
        if levels != 0:
            put_group(out, levels_at(levels, i64(row + PRODUCT.y_factors), pair), 0, tid < 32)

    return matvec


def warps(strips: int) -> int:
    """How many warps share a strip's groups in `matvec`. Few strips need more of them, to have loads under way."""
    return _MOST_WARPS if strips <= _FEW_STRIPS else _MOST_WARPS // 2


@functools.cache
def matmul(shape: Shape, bits: int) -> Kernel:
    """The kernel whose blocks have this shape, for weights of so many bits."""
    STRIPS, TILES, WARPS, BLOCKS = shape
    BYTES, SCALE_BYTES = fragment_bytes(bits), scale_bytes(bits)
    COUNT = STRIPS * TILES * 4
    ALL, WORDS, SCALES = WARPS * COUNT * 32, (STRIPS, 4), (STRIPS, 2)

    @kernel(32 * WARPS, BLOCKS, f"matmul {bits} {STRIPS}×{TILES}")
    def matmul(table: Address, T: Int) -> None:
        """All products of a table of `ProductRow` with T tokens. Blocks: (strips, tiles, products).

        A block's warps share the groups.
        """
        let_next_begin()
        sums = cuda.shared.array(ALL, types.float32)
        own = cuda.local.array(COUNT, types.float32)
        weight = cuda.local.array(WORDS, types.int32)
        scale = cuda.local.array(SCALES, types.float32)
        place = cuda.local.array(STRIPS, types.int64)
        row = table + _PRODUCT_ROW_BYTES * np.int64(cuda.blockIdx.z)
        first = STRIPS * np.int64(cuda.blockIdx.x)
        strips, groups = i64(row + PRODUCT.strips), i64(row + PRODUCT.groups)
        if first >= strips:
            return
        tile, tid = TILES * np.int64(cuda.blockIdx.y), np.int64(cuda.threadIdx.x)
        lane, warp, warps = tid % 32, tid // 32, np.int64(cuda.blockDim.x // 32)
        for i in range(COUNT):
            own[i] = np.float32(0)
        for i in range(STRIPS):
            # Beyond the last strip that one is read again, and nothing is put.
            place[i] = min(first + i, strips - 1) * groups
        inputs, factors = i64(row + PRODUCT.levels), i64(row + PRODUCT.factors) + lane % 4 * 8
        values, scales = i64(row + PRODUCT.weights), i64(row + PRODUCT.scales)
        wait_for_previous()
        for g in range(warp, groups, warps):
            for i in range(STRIPS):
                levels = levels_of(weights_at(values + BYTES * (place[i] + g), lane, bits), bits)
                weight[i, 0], weight[i, 1], weight[i, 2], weight[i, 3] = levels
                two = scales_at(scales + SCALE_BYTES * (place[i] + g), lane // 4, bits)
                scale[i, 0], scale[i, 1] = both_scales(two, bits)
            for c in range(TILES):
                block = (tile + c) * groups + g
                x = words(inputs + LEVEL_BYTES * block + 16 * lane)
                f0, f1 = f32(factors + FACTOR_BYTES * block), f32(factors + FACTOR_BYTES * block + 4)
                for i in range(STRIPS):
                    p0, p1, p2, p3 = products(
                        (weight[i, 0], weight[i, 1], weight[i, 2], weight[i, 3]),
                        x,
                        lane,
                        values + BYTES * (place[i] + g),
                        bits,
                        inputs + LEVEL_BYTES * block,
                    )
                    at = (i * TILES + c) * 4
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
            n = STRIP * (first + i // (4 * TILES)) + owner // 4 + i % 4 // 2 * 8
            t = TOKENS * (tile + i // 4 % TILES) + owner % 4 * 2 + i % 2
            if n < i64(row + PRODUCT.N) and t < T:
                _finish(row, total, t, n)

    return matmul


@functools.cache
def matmul_wide(bits: int) -> Kernel:
    """The kernel for more tokens than `SHAPES` serve, and weights of so many bits."""
    BYTES, SCALE_BYTES = fragment_bytes(bits), scale_bytes(bits)

    @kernel(WIDE_THREADS, 2, f"matmul_wide {bits}")
    def matmul_wide(table: Address, T: Int) -> None:
        """All products of a table of `ProductRow` with many tokens. Blocks: (strips, tiles, products).

        A warp has all groups of its strips and tokens. What it needs of the next group comes while it multiplies one.
        """
        let_next_begin()
        sums = cuda.shared.array(_WIDE_ALL, types.float32)
        own = cuda.local.array(_WIDE_SUMS, types.float32)
        weight, level = cuda.local.array(_WIDE_WEIGHTS, types.int32), cuda.local.array(_WIDE_LEVELS, types.int32)
        scale, factor = cuda.local.array(_WIDE_SCALES, types.int32), cuda.local.array(_WIDE_FACTORS, types.float32)
        place = cuda.local.array(_WIDE_STRIPS, types.int64)
        row = table + _PRODUCT_ROW_BYTES * np.int64(cuda.blockIdx.z)
        strips, groups = i64(row + PRODUCT.strips), i64(row + PRODUCT.groups)
        if WIDE_STRIPS * np.int64(cuda.blockIdx.x) >= strips:
            return
        lane, warp = np.int64(cuda.threadIdx.x) % 32, np.int64(cuda.threadIdx.x) // 32
        first = _WIDE_STRIPS * (_WARPS_DOWN * np.int64(cuda.blockIdx.x) + warp % _WARPS_DOWN)
        tile = _WIDE_TILES * (_WARPS_ACROSS * np.int64(cuda.blockIdx.y) + warp // _WARPS_DOWN)
        for i in range(_WIDE_SUMS):
            own[i] = np.float32(0)
        for i in range(_WIDE_STRIPS):
            # Beyond the last strip that one is read again, and nothing is put.
            place[i] = min(first + i, strips - 1) * groups
        inputs, factors = i64(row + PRODUCT.levels), i64(row + PRODUCT.factors) + lane % 4 * 8
        values, scales = i64(row + PRODUCT.weights), i64(row + PRODUCT.scales)
        wait_for_previous()
        for g in range(groups + 1):
            if g < groups:  # the next one
                for i in range(_WIDE_STRIPS):
                    loaded = weights_at(values + BYTES * (place[i] + g), lane, bits)
                    for j in range(4):
                        weight[1, 4 * i + j] = loaded[j]
                    scale[1, i] = scales_at(scales + SCALE_BYTES * (place[i] + g), lane // 4, bits)
                for c in range(_WIDE_TILES):
                    block = (tile + c) * groups + g
                    loaded = words(inputs + LEVEL_BYTES * block + 16 * lane)
                    for j in range(4):
                        level[1, 4 * c + j] = loaded[j]
                    factor[1, 2 * c] = f32(factors + FACTOR_BYTES * block)
                    factor[1, 2 * c + 1] = f32(factors + FACTOR_BYTES * block + 4)
            if g > 0:
                for i in range(_WIDE_STRIPS):
                    upper, lower = both_scales(scale[0, i], bits)
                    stored = weight[0, 4 * i], weight[0, 4 * i + 1], weight[0, 4 * i + 2], weight[0, 4 * i + 3]
                    levels = levels_of(stored, bits)
                    for c in range(_WIDE_TILES):
                        f0, f1 = factor[0, 2 * c], factor[0, 2 * c + 1]
                        p0, p1, p2, p3 = products(
                            levels,
                            (level[0, 4 * c], level[0, 4 * c + 1], level[0, 4 * c + 2], level[0, 4 * c + 3]),
                            lane,
                            values + BYTES * (place[i] + g - 1),
                            bits,
                            inputs + LEVEL_BYTES * ((tile + c) * groups + g - 1),
                        )
                        at = (i * _WIDE_TILES + c) * 4
                        own[at] += np.float32(p0) * (upper * f0)
                        own[at + 1] += np.float32(p1) * (upper * f1)
                        own[at + 2] += np.float32(p2) * (lower * f0)
                        own[at + 3] += np.float32(p3) * (lower * f1)
            for i in range(4 * _WIDE_STRIPS):
                weight[0, i] = weight[1, i]
            for i in range(4 * _WIDE_TILES):
                level[0, i] = level[1, i]
            for i in range(_WIDE_STRIPS):
                scale[0, i] = scale[1, i]
            for i in range(2 * _WIDE_TILES):
                factor[0, i] = factor[1, i]
        # The loop below is too long to be unrolled, and registers have no index.
        for i in range(_WIDE_SUMS):
            sums[WIDE_THREADS * i + cuda.threadIdx.x] = own[i]
        for i in range(_WIDE_SUMS):
            n = STRIP * (first + i // (4 * _WIDE_TILES)) + lane // 4 + i % 4 // 2 * 8
            t = TOKENS * (tile + i // 4 % _WIDE_TILES) + lane % 4 * 2 + i % 2
            if n < i64(row + PRODUCT.N) and t < T:
                _finish(row, sums[WIDE_THREADS * i + cuda.threadIdx.x], t, n)

    return matmul_wide
