"""y = x · wᵀ for many tokens in float16 on tensor cores, with sums in float32: x [T, K], w [N, K] in int8 or codes.

Beyond some tokens multiplying takes longer than reading. A product of integers leaves four instructions for each sum of
each group, which a product of floats does not. A token's activations are float16 of x · 2⁻ᵉ, where e brings the largest
to 2¹⁴ or more, and weights are float16 of level · scale. Both have 11 bits.
"""

import functools
import itertools
from typing import Any

import numpy as np

from rwkv_cli.kernels.cuda.device.codes import (
    STRIP,
    fragment_bytes,
    hidden_zero,
    levels_of,
    scale_bytes,
    shared_scales,
    shared_weights,
)
from rwkv_cli.kernels.cuda.device.compile import (
    Address,
    Int,
    Kernel,
    copy_ahead,
    cuda,
    end_of_copies,
    f32,
    float_of,
    four_words,
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
    put_copied,
    put_f32,
    put_i32,
    shared_address,
    types,
    wait_for_copies,
    wait_for_previous,
)
from rwkv_cli.kernels.cuda.device.compile import bits as bits_of
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
from rwkv_cli.kernels.cuda.device.matmul import PRODUCT, PRODUCT_ROW_BYTES, unit_at, unit_of
from rwkv_cli.kernels.cuda.device.outputs import output_at, put_outputs
from rwkv_cli.numbers import GROUP

ROW_THREADS, _ROW_WARPS = 256, 8
"""Most threads and warps of a block of `to_halves`."""
_HALF_BYTES = 2 * TOKENS * GROUP
"""A block of activations: 8 tokens × 32 columns."""
_WARPS, _STRIPS, _TILES = 4, 2, 8
"""Warps of a block of `matmul_half`, strips of a warp, and tiles of the block."""
STRIPS, TOKENS_OF_BLOCK, THREADS = _WARPS * _STRIPS, TOKENS * _TILES, 32 * _WARPS
"""The shape of a block."""
_BLOCKS, _STAGES = 3, 4
"""Blocks that a multiprocessor should hold, and groups that a block has in shared memory or on the way there."""
_OWN_TILES = _TILES // _WARPS
_COPIES = 2 * _STRIPS + _OWN_TILES
"""What a warp brings of a group: its strips, their scales, and tiles for all warps."""
_SUMS, _WEIGHTS, _HELD = 4 * _STRIPS * _TILES, 8 * _STRIPS, (_COPIES, 4)
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
def _bring(sources: Any, target: Int, held: Any, copies: Any, which: Any) -> None:
    """Begin some of a warp's copies to its part of a stage, and move on. `held` is for `_put`.

    `copies` says how many bytes each has, of which a lane copies 16, and where it begins in that part.
    """
    sizes, offsets = copies
    for i in range(which[0], which[1]):
        if np.int64(cuda.threadIdx.x) % 32 < sizes[i] // 16:
            copied = copy_ahead(target + offsets[i], sources[i])
            held[i, 0], held[i, 1], held[i, 2], held[i, 3] = copied
        sources[i] += sizes[i]


@function
def _put(target: Int, held: Any, copies: Any, which: Any) -> None:
    """End what `_bring` began."""
    sizes, offsets = copies
    for i in range(which[0], which[1]):
        if np.int64(cuda.threadIdx.x) % 32 < sizes[i] // 16:
            put_copied(target + offsets[i], (held[i, 0], held[i, 1], held[i, 2], held[i, 3]))


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
    SIZES = *(BYTES,) * _STRIPS, *(SCALE_BYTES,) * _STRIPS, *(_HALF_BYTES,) * _OWN_TILES
    OFFSETS = 0, *itertools.accumulate(SIZES)
    COPIES, OF_STRIPS, OF_TILES, ALL = (SIZES, OFFSETS), (0, 2 * _STRIPS), (2 * _STRIPS, _COPIES), (0, _COPIES)
    # Counts of int32: a fragment, its scales, a tile, where scales and tiles begin, a warp's copies, and all warps'.
    WEIGHT, SCALE, TILE = BYTES // 4, SCALE_BYTES // 4, _HALF_BYTES // 4
    SCALES, TILES, PART = (OFFSETS[i] // 4 for i in (_STRIPS, 2 * _STRIPS, _COPIES))
    STAGE = _WARPS * PART
    END = _STAGES * STAGE
    SHARED = max(END, THREADS * _SUMS)

    @kernel(THREADS, _BLOCKS, f"matmul_half {bits}")
    def matmul_half(table: Address, T: Int) -> None:
        """All products of a table of `ProductRow` with many tokens. Blocks: (strips, tiles, products).

        A group of a block's strips and tokens is a stage in shared memory. While one is multiplied, the next ones come.
        """
        let_next_begin()
        shared = cuda.shared.array(SHARED, types.int32, 16)
        own, weight = cuda.local.array(_SUMS, types.float32), cuda.local.array(_WEIGHTS, types.int32)
        source, held = cuda.local.array(_COPIES, types.int64), cuda.local.array(_HELD, types.int32)
        total, token = cuda.local.array(4, types.float32), cuda.local.array(4, types.int64)
        row = table + PRODUCT_ROW_BYTES * np.int64(cuda.blockIdx.z)
        strips, groups = i64(row + PRODUCT.strips), i64(row + PRODUCT.groups)
        first, tile = STRIPS * np.int64(cuda.blockIdx.x), _TILES * np.int64(cuda.blockIdx.y)
        if first >= strips:
            return
        tid = np.int64(cuda.threadIdx.x)
        lane, warp, zero = tid % 32, tid // 32, hidden_zero(groups + tid)
        for i in range(_STRIPS):
            # Beyond the last strip that one is brought again, and nothing is put.
            fragment = min(first + _STRIPS * warp + i, strips - 1) * groups
            source[i] = i64(row + PRODUCT.weights) + BYTES * fragment + 16 * lane
            source[_STRIPS + i] = i64(row + PRODUCT.scales) + SCALE_BYTES * fragment + 16 * lane
        for i in range(_OWN_TILES):
            at = (tile + _OWN_TILES * warp + i) * groups
            source[2 * _STRIPS + i] = i64(row + PRODUCT.levels) + _HALF_BYTES * at + 16 * lane
        target = shared_address(shared) + 4 * PART * warp + 16 * lane
        for i in range(_SUMS):
            own[i] = np.float32(0)
        # The first weights come while the launch before ends.
        for g in range(_STAGES - 1):
            if g < groups:
                _bring(source, target + 4 * STAGE * g, held, COPIES, OF_STRIPS)
                _put(target + 4 * STAGE * g, held, COPIES, OF_STRIPS)
        wait_for_previous()
        for g in range(_STAGES - 1):
            if g < groups:
                _bring(source, target + 4 * STAGE * g, held, COPIES, OF_TILES)
                _put(target + 4 * STAGE * g, held, COPIES, OF_TILES)
            end_of_copies()
        here, free = np.int64(0), np.int64(END - STAGE)
        for g in range(groups):
            wait_for_copies()
            cuda.syncthreads()  # all has come that was waited for, and nobody reads the stage that is free
            if g < groups - (_STAGES - 1):
                _bring(source, target + 4 * free, held, COPIES, ALL)
            end_of_copies()
            part = here + PART * warp
            for i in range(_STRIPS):
                upper, lower = _both(shared_scales(shared, part + SCALES + SCALE * i, lane // 4, bits), bits)
                stored = shared_weights(shared, part + WEIGHT * i, lane, bits)
                left, left_8, right, right_8 = levels_of(stored, bits, zero)
                at = 8 * i
                weight[at], weight[at + 2] = _scaled(left, upper, bits)
                weight[at + 1], weight[at + 3] = _scaled(left_8, lower, bits)
                weight[at + 4], weight[at + 6] = _scaled(right, upper, bits)
                weight[at + 5], weight[at + 7] = _scaled(right_8, lower, bits)
            for c in range(_TILES):
                at = here + PART * (c // _OWN_TILES) + TILES + TILE * (c % _OWN_TILES)
                tokens = four_words(shared, at + 4 * lane)
                for i in range(_STRIPS):
                    at, w = (i * _TILES + c) * 4, 8 * i
                    own[at], own[at + 1], own[at + 2], own[at + 3] = half_products(
                        (
                            weight[w], weight[w + 1], weight[w + 2], weight[w + 3],
                            weight[w + 4], weight[w + 5], weight[w + 6], weight[w + 7],
                        ),
                        tokens,
                        (own[at], own[at + 1], own[at + 2], own[at + 3]),
                    )  # fmt: skip
            if g < groups - (_STAGES - 1):
                _put(target + 4 * free, held, COPIES, ALL)
            free = here
            here = here + STAGE if here < END - STAGE else np.int64(0)
        cuda.syncthreads()
        # The loops below are too long to be unrolled, and registers have no index.
        for i in range(_SUMS):
            shared[np.uint64(THREADS * i + tid)] = bits_of(own[i])
        output, units, N = output_at(row + PRODUCT.bias), unit_at(row), i64(row + PRODUCT.N)
        factors = i64(row + PRODUCT.factors)
        for side in range(2 * _STRIPS):
            n = STRIP * (first + _STRIPS * warp + side // 2) + lane // 4 + side % 2 * 8
            if n < N:
                unit = unit_of(units, n) * (_UNDONE if bits == 8 else np.float32(1))
                for c in range(0, _TILES, 2):
                    for e in range(4):
                        at = (side // 2 * _TILES + c + e // 2) * 4 + side % 2 * 2 + e % 2
                        token[e] = TOKENS * (tile + c + e // 2) + lane % 4 * 2 + e % 2
                        total[e] = float_of(np.int64(shared[np.uint64(THREADS * at + tid)]))
                        total[e] *= f32(factors + 4 * min(token[e], T - 1)) * unit
                    put_outputs(output, total, token, n, T)

    return matmul_half
