"""y = x · wᵀ for many tokens in float16 on tensor cores, with sums in float32: x [T, K], w [N, K] in int8 or codes.

Beyond some tokens multiplying takes longer than reading. A product of integers leaves four instructions for each sum of
each group, which a product of floats does not. A token's activations are float16 of x · 2⁻ᵉ, where e brings the largest
to 2¹⁴ or more, and weights are float16 of level · scale. Both have 11 bits.
"""

import functools
from typing import Any

import numpy as np

from rwkv_cli.kernels.cuda.device.codes import (
    STRIP,
    fragment_bytes,
    levels_of,
    scale_bytes,
    scales_at,
    weights_at,
)
from rwkv_cli.kernels.cuda.device.compile import (
    Address,
    Int,
    Kernel,
    cuda,
    f32,
    float_of,
    function,
    half_bits,
    half_products,
    halves_difference,
    halves_product,
    i64,
    kernel,
    largest_of_warp,
    let_next_begin,
    low_word,
    permute,
    put_f32,
    put_i32,
    types,
    wait_for_previous,
    words,
)
from rwkv_cli.kernels.cuda.device.levels import (
    FACTOR,
    FACTOR_ROW_BYTES,
    QUADS,
    TOKENS,
    four_mixed,
    in_quads,
    magnitude,
    operand_of,
)
from rwkv_cli.kernels.cuda.device.matmul import PRODUCT, PRODUCT_ROW_BYTES, finish
from rwkv_cli.numbers import GROUP

ROW_THREADS, _ROW_WARPS = 256, 8
"""Most threads and warps of a block of `to_halves`."""
_HALF_BYTES = 2 * TOKENS * GROUP
"""A block of activations: 8 tokens × 32 columns."""
_STRIPS, _TILES, _WARPS_DOWN, _WARPS_ACROSS = 4, 4, 2, 2
"""What a warp of `matmul_half` has, and how its block's warps lie."""
STRIPS, TOKENS_OF_BLOCK = _STRIPS * _WARPS_DOWN, TOKENS * _TILES * _WARPS_ACROSS
"""The shape of a block of `matmul_half`."""
THREADS = 32 * _WARPS_DOWN * _WARPS_ACROSS
_SUMS = 4 * _STRIPS * _TILES
_WEIGHTS, _LEVELS, _SCALES = (2, 4 * _STRIPS), (2, 4 * _TILES), (2, _STRIPS)
_ALL = THREADS * _SUMS
_TOP_EXPONENT = 14
"""The exponent that a token's largest activation gets. Rounded up, it is still far from float16's end."""
_UNDONE = np.float32(256)
"""Levels of int8 are made 2⁻⁸ of what they are, so that their products with scales are no infinity."""


@function
def _halves(word: Int, selectors: Int, bits: Int) -> Any:
    """Two int8 that the selectors of a `permute` choose of an int32, as float16; 2⁻⁸ of them if `bits` are 8."""
    # An unsigned byte is the float16 of 1024 + b with 0x64 in its upper byte, and that of 4 + b/256 with 0x44.
    unsigned = low_word(np.int64(word) ^ 0x80808080)
    if bits == 8:
        return halves_difference(permute(unsigned, 0x44444444, selectors), 0x44804480)
    return halves_difference(permute(unsigned, 0x64646464, selectors), 0x64806480)


@function
def _scaled(word: Int, scale: Int, bits: Int) -> Any:
    """Four levels times a scale (twice in an int32) as float16: the first two, and the others."""
    first, others = _halves(word, 0x4140, bits), _halves(word, 0x4342, bits)
    return halves_product(first, scale), halves_product(others, scale)


@function
def _both(stored: Int, bits: Int) -> Any:
    """The scales of rows g and g + 8 of a `scales_at` in float16, each twice in an int32."""
    scales = stored if bits == 8 else _halves(stored, 0x4140, bits)
    return permute(scales, scales, 0x1010), permute(scales, scales, 0x3232)


@function
def _four_of(values: Any, i: Int) -> Any:
    """The i-th four of the values that are multiplied now."""
    return values[0, 4 * i], values[0, 4 * i + 1], values[0, 4 * i + 2], values[0, 4 * i + 3]


@kernel(ROW_THREADS)
def to_halves(table: Address) -> None:
    """Round each matrix of a table of `FactorRow` to float16, in its `levels`. Blocks: (T, matrices).

    Its `factors` get float32 [T], what a token's float16 must be multiplied by: NaN if one is not finite.
    """
    let_next_begin()
    wait_for_previous()
    tops = cuda.shared.array(_ROW_WARPS, types.int32)
    row = table + FACTOR_ROW_BYTES * np.int64(cuda.blockIdx.y)
    t, tid, threads = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
    groups = (i64(row + FACTOR.K) + GROUP - 1) // GROUP
    x, top = operand_of(row), np.int64(0)
    together = in_quads(x)
    for quad in range(tid, groups * QUADS, threads):
        a, b, c, d = four_mixed(x, t, 4 * quad, together)
        top = max(top, max(max(magnitude(a), magnitude(b)), max(magnitude(c), magnitude(d))))
    of_warp = largest_of_warp(low_word(top))
    if tid % 32 == 0:
        tops[tid // 32] = of_warp
    cuda.syncthreads()
    largest = np.int64(0)
    for warp in range(threads // 32):
        largest = max(largest, np.int64(tops[warp]))
    # 2^e as the bits of a float32, and 2^−e: exponents are those bits from 23 on, 127 more than what they are
    exponent = max(largest >> 23, np.int64(_TOP_EXPONENT + 1))
    inverse = float_of(min(254 + _TOP_EXPONENT - exponent, np.int64(254)) << 23)
    if tid == 0:
        factor = float_of((exponent - _TOP_EXPONENT) << 23)
        put_f32(i64(row + FACTOR.factors) + 4 * t, factor + float_of(largest) * np.float32(0))
    for quad in range(tid, groups * QUADS, threads):
        k, place = 4 * quad, quad % QUADS
        block = i64(row + FACTOR.levels) + _HALF_BYTES * (t // TOKENS * groups + quad // QUADS)
        at = block + 16 * (t % TOKENS * 4 + place % 4) + 8 * (place // 4)
        a, b, c, d = four_mixed(x, t, k, together)
        put_i32(at, np.int64(half_bits(a * inverse)) | np.int64(half_bits(b * inverse)) << 16)
        put_i32(at + 4, np.int64(half_bits(c * inverse)) | np.int64(half_bits(d * inverse)) << 16)


@functools.cache
def matmul_half(bits: int) -> Kernel:
    """The kernel for weights of so many bits."""
    BYTES, SCALE_BYTES = fragment_bytes(bits), scale_bytes(bits)

    @kernel(THREADS, 2, f"matmul_half {bits}")
    def matmul_half(table: Address, T: Int) -> None:
        """All products of a table of `ProductRow` with many tokens. Blocks: (strips, tiles, products).

        A warp has all groups of its strips and tokens. What it needs of the next group comes while it multiplies one.
        """
        let_next_begin()
        sums = cuda.shared.array(_ALL, types.float32)
        own = cuda.local.array(_SUMS, types.float32)
        weight, level = cuda.local.array(_WEIGHTS, types.int32), cuda.local.array(_LEVELS, types.int32)
        scale, place = cuda.local.array(_SCALES, types.int32), cuda.local.array(_STRIPS, types.int64)
        row = table + PRODUCT_ROW_BYTES * np.int64(cuda.blockIdx.z)
        strips, groups = i64(row + PRODUCT.strips), i64(row + PRODUCT.groups)
        if STRIPS * np.int64(cuda.blockIdx.x) >= strips:
            return
        lane, warp = np.int64(cuda.threadIdx.x) % 32, np.int64(cuda.threadIdx.x) // 32
        first = _STRIPS * (_WARPS_DOWN * np.int64(cuda.blockIdx.x) + warp % _WARPS_DOWN)
        tile = _TILES * (_WARPS_ACROSS * np.int64(cuda.blockIdx.y) + warp // _WARPS_DOWN)
        for i in range(_SUMS):
            own[i] = np.float32(0)
        for i in range(_STRIPS):
            # Beyond the last strip that one is read again, and nothing is put.
            place[i] = min(first + i, strips - 1) * groups
        inputs, factors = i64(row + PRODUCT.levels), i64(row + PRODUCT.factors)
        values, scales = i64(row + PRODUCT.weights), i64(row + PRODUCT.scales)
        wait_for_previous()
        for g in range(groups + 1):
            if g < groups:  # the next one
                for i in range(_STRIPS):
                    loaded = weights_at(values + BYTES * (place[i] + g), lane, bits)
                    for j in range(4):
                        weight[1, 4 * i + j] = loaded[j]
                    scale[1, i] = scales_at(scales + SCALE_BYTES * (place[i] + g), lane // 4, bits)
                for c in range(_TILES):
                    loaded = words(inputs + _HALF_BYTES * ((tile + c) * groups + g) + 16 * lane)
                    for j in range(4):
                        level[1, 4 * c + j] = loaded[j]
            if g > 0:
                for i in range(_STRIPS):
                    upper, lower = _both(scale[0, i], bits)
                    stored = _four_of(weight, i)
                    left, left_8, right, right_8 = levels_of(stored, bits)
                    a0, a2 = _scaled(left, upper, bits)
                    a1, a3 = _scaled(left_8, lower, bits)
                    a4, a6 = _scaled(right, upper, bits)
                    a5, a7 = _scaled(right_8, lower, bits)
                    for c in range(_TILES):
                        at = (i * _TILES + c) * 4
                        own[at], own[at + 1], own[at + 2], own[at + 3] = half_products(
                            (a0, a1, a2, a3, a4, a5, a6, a7),
                            _four_of(level, c),
                            (own[at], own[at + 1], own[at + 2], own[at + 3]),
                        )
            for i in range(4 * _STRIPS):
                weight[0, i] = weight[1, i]
            for i in range(4 * _TILES):
                level[0, i] = level[1, i]
            for i in range(_STRIPS):
                scale[0, i] = scale[1, i]
        # The loop below is too long to be unrolled, and registers have no index.
        for i in range(_SUMS):
            sums[THREADS * i + cuda.threadIdx.x] = own[i]
        for i in range(_SUMS):
            n = STRIP * (first + i // (4 * _TILES)) + lane // 4 + i % 4 // 2 * 8
            t = TOKENS * (tile + i // 4 % _TILES) + lane % 4 * 2 + i % 2
            if n < i64(row + PRODUCT.N) and t < T:
                total = sums[THREADS * i + cuda.threadIdx.x] * f32(factors + 4 * t)
                if bits == 8:
                    total *= _UNDONE
                finish(row, total, t, n)

    return matmul_half
