"""y = x · wᵀ on the GPU: x [T, K], w [N, K] in int8 or codes of 4, 5 or 6 bits, y [T, N]. docs/cuda.md has the order.

x is rounded to levels (`levels`) in one plane or two, and sums of a group are exact integers. One token is a matter of
reading the weights (dp4a), many of multiplying (tensor cores). One launch does all products of a `Linear` with weights
of as many bits and levels of as many planes.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from rwkv_cli.kernels.cuda.device.codes import (
    STRIP,
    both_scales,
    fragment_bytes,
    hidden_zero,
    levels_of,
    prefetch_fragment,
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
    products_8,
    quad_sum,
    types,
    wait_for_previous,
)
from rwkv_cli.kernels.cuda.device.levels import FACTOR_BYTES, PLANE_BYTES, TOKENS, lane_levels, levels_at, put_group
from rwkv_cli.kernels.cuda.device.outputs import OutputFields, output_at, put_output


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
    y_planes: Int


PRODUCT = ProductRow(*range(0, 8 * len(ProductRow._fields), 8))
"""The offset of each column in a row, in bytes."""
PRODUCT_ROW_BYTES = 8 * len(PRODUCT)
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
"""Each serves as many tokens as a block has; `halves` serves all beyond."""
MOST_TOKENS = SHAPES[-1].tokens


@function
def unit_at(row: Address) -> Any:
    """The fields of a `ProductRow` that `unit_of` takes, read once, as those of `output_at` are."""
    return float_of(i64(row + PRODUCT.unit)), i64(row + PRODUCT.rows)


@function
def unit_of(units: Any, n: Int) -> Any:
    """The factor of the sums of output n: the matrix's unit times the row's own."""
    unit, rows = units
    return unit * f32(rows + 4 * n) if rows != 0 else unit


@function
def _dots(weights: Any, levels: Any, planes: Int) -> Any:
    """The sums of rows g and g + 8 over a lane's 8 columns with the one token's levels."""
    left, left_8, right, right_8 = weights
    high_left, high_right, low_left, low_right = levels
    high = dp4a(right, high_right, dp4a(left, high_left, 0))
    high_8 = dp4a(right_8, high_right, dp4a(left_8, high_left, 0))
    if planes == 1:
        return high, high_8
    low = dp4a(right, low_right, dp4a(left, low_left, high * 256))
    return low, dp4a(right_8, low_right, dp4a(left_8, low_left, high_8 * 256))


@function
def _added(a: Float, a_8: Float, dots: Any, scales: Any, factor: Float) -> Any:
    """The sums a and a_8 of rows g and g + 8, with a group's `_dots` added."""
    dot, dot_8 = dots
    scale, scale_8 = scales
    return a + np.float32(dot) * (scale * factor), a_8 + np.float32(dot_8) * (scale_8 * factor)


@functools.cache
def matvec(bits: int, planes: int) -> Kernel:
    """The kernel for one token, weights of so many bits and levels of so many planes."""
    BYTES, SCALE_BYTES, LEVEL_BYTES = fragment_bytes(bits), scale_bytes(bits), PLANE_BYTES * planes

    @kernel(_VECTOR_THREADS, name=f"matvec {_numbers(bits, planes)}")
    def matvec(table: Address) -> None:
        """All products of a table of `ProductRow` with one token. Blocks: (pairs of strips, products).

        Half of a block's warps have one strip, half the other, and they share the groups. So a block's outputs are a
        group of what reads them, and their levels can be put here.
        """
        let_next_begin()
        sums = cuda.shared.array(_PAIRS, types.float32)
        row = table + PRODUCT_ROW_BYTES * np.int64(cuda.blockIdx.y)
        pair, groups, tid = np.int64(cuda.blockIdx.x), i64(row + PRODUCT.groups), np.int64(cuda.threadIdx.x)
        if 2 * pair >= i64(row + PRODUCT.strips):
            return
        lane, warps, zero = tid % 32, np.int64(cuda.blockDim.x // 64), hidden_zero(groups + tid)
        half_of_block = 1 if tid >= 32 * warps else 0
        strip = 2 * pair + half_of_block
        w = i64(row + PRODUCT.weights) + BYTES * strip * groups
        s = i64(row + PRODUCT.scales) + SCALE_BYTES * strip * groups
        x, f = i64(row + PRODUCT.levels) + lane % 4 * 8 * planes, i64(row + PRODUCT.factors)
        a, a_8 = np.float32(0), np.float32(0)
        g = tid // 32 - warps * half_of_block
        if strip >= i64(row + PRODUCT.strips):  # the last block of an odd number has one
            g = groups
        # The first weights come while the launch before ends, and what the end needs.
        for i in range(4):
            if g + i * warps < groups:
                prefetch_fragment(w + BYTES * (g + i * warps), lane, BYTES)
        rows, bias = i64(row + PRODUCT.rows), i64(row + PRODUCT.bias)
        if tid == 0 and rows != 0:
            prefetch(rows + 4 * 32 * pair)
        if tid == 0 and bias != 0:
            prefetch(bias + 4 * 32 * pair)
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
            x0, x1 = lane_levels(x + LEVEL_BYTES * g, planes), lane_levels(x + LEVEL_BYTES * g1, planes)
            x2, x3 = lane_levels(x + LEVEL_BYTES * g2, planes), lane_levels(x + LEVEL_BYTES * g3, planes)
            a, a_8 = _added(a, a_8, _dots(levels_of(w0, bits, zero), x0, planes), both_scales(s0, bits), f0)
            a, a_8 = _added(a, a_8, _dots(levels_of(w1, bits, zero), x1, planes), both_scales(s1, bits), f1)
            a, a_8 = _added(a, a_8, _dots(levels_of(w2, bits, zero), x2, planes), both_scales(s2, bits), f2)
            a, a_8 = _added(a, a_8, _dots(levels_of(w3, bits, zero), x3, planes), both_scales(s3, bits), f3)
            g += 4 * warps
        while g < groups:
            scales, factor = scales_at(s + SCALE_BYTES * g, lane // 4, bits), f32(f + FACTOR_BYTES * g)
            weights, x0 = weights_at(w + BYTES * g, lane, bits), lane_levels(x + LEVEL_BYTES * g, planes)
            dots = _dots(levels_of(weights, bits, zero), x0, planes)
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
                out = put_output(output_at(row + PRODUCT.bias), total * unit_of(unit_at(row), n), 0, n)
        levels = i64(row + PRODUCT.y_levels)
        if levels != 0:
            at = levels_at(levels, i64(row + PRODUCT.y_factors), i64(row + PRODUCT.y_planes), pair)
            put_group(out, at, 0, tid < 32)

    return matvec


def _numbers(bits: int, planes: int) -> str:
    """The numbers that a kernel multiplies, as its name says them."""
    return f"{bits}{' × 8' * (planes == 1)}"


def warps(strips: int) -> int:
    """How many warps share a strip's groups in `matvec`. Few strips need more of them, to have loads under way."""
    return _MOST_WARPS if strips <= _FEW_STRIPS else _MOST_WARPS // 2


@functools.cache
def matmul(shape: Shape, bits: int, planes: int) -> Kernel:
    """The kernel whose blocks have this shape, for weights of so many bits and levels of so many planes."""
    STRIPS, TILES, WARPS, BLOCKS = shape
    BYTES, SCALE_BYTES, LEVEL_BYTES = fragment_bytes(bits), scale_bytes(bits), PLANE_BYTES * planes
    COUNT = STRIPS * TILES * 4
    ALL, WORDS, SCALES = WARPS * COUNT * 32, (STRIPS, 4), (STRIPS, 2)

    @kernel(32 * WARPS, BLOCKS, f"matmul {_numbers(bits, planes)}, {STRIPS}×{TILES}")
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
        row = table + PRODUCT_ROW_BYTES * np.int64(cuda.blockIdx.z)
        first = STRIPS * np.int64(cuda.blockIdx.x)
        strips, groups = i64(row + PRODUCT.strips), i64(row + PRODUCT.groups)
        if first >= strips:
            return
        tile, tid = TILES * np.int64(cuda.blockIdx.y), np.int64(cuda.threadIdx.x)
        lane, warp, warps = tid % 32, tid // 32, np.int64(cuda.blockDim.x // 32)
        zero = hidden_zero(groups + tid)
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
                levels = levels_of(weights_at(values + BYTES * (place[i] + g), lane, bits), bits, zero)
                weight[i, 0], weight[i, 1], weight[i, 2], weight[i, 3] = levels
                two = scales_at(scales + SCALE_BYTES * (place[i] + g), lane // 4, bits)
                scale[i, 0], scale[i, 1] = both_scales(two, bits)
            for c in range(TILES):
                block = (tile + c) * groups + g
                x = lane_levels(inputs + LEVEL_BYTES * block + 8 * planes * lane, planes)
                f0, f1 = f32(factors + FACTOR_BYTES * block), f32(factors + FACTOR_BYTES * block + 4)
                for i in range(STRIPS):
                    weights = weight[i, 0], weight[i, 1], weight[i, 2], weight[i, 3]
                    where = values + BYTES * (place[i] + g)
                    if planes == 1:
                        p0, p1, p2, p3 = products_8(weights, x, lane, where, bits, inputs + LEVEL_BYTES * block)
                    else:
                        p0, p1, p2, p3 = products(weights, x, lane, where, bits, inputs + LEVEL_BYTES * block)
                    at = (i * TILES + c) * 4
                    own[at] += np.float32(p0) * (scale[i, 0] * f0)
                    own[at + 1] += np.float32(p1) * (scale[i, 0] * f1)
                    own[at + 2] += np.float32(p2) * (scale[i, 1] * f0)
                    own[at + 3] += np.float32(p3) * (scale[i, 1] * f1)
        for i in range(COUNT):
            sums[(warp * COUNT + i) * 32 + lane] = own[i]
        cuda.syncthreads()
        output, units, N = output_at(row + PRODUCT.bias), unit_at(row), i64(row + PRODUCT.N)
        for e in range(tid, COUNT * 32, 32 * warps):
            i, owner = e // 32, e % 32
            total = sums[e]
            for other in range(1, warps):
                total += sums[other * COUNT * 32 + e]
            n = STRIP * (first + i // (4 * TILES)) + owner // 4 + i % 4 // 2 * 8
            t = TOKENS * (tile + i // 4 % TILES) + owner % 4 * 2 + i % 2
            if n < N and t < T:
                put_output(output, total * unit_of(units, n), t, n)

    return matmul
