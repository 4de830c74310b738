"""Activations rounded to int16 in groups of 32, as two int8 planes in the order of fragments (docs/cuda.md).

x ≈ (256·high + low) · factor. The factor is max|x| / 32512 of its group, and NaN if an x of the group is not finite.
Either one launch rounds all inputs of several products, or the kernel that computes an activation puts its levels
beside it.
"""

from typing import Any, NamedTuple

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import (
    Address,
    Float,
    Int,
    bits,
    cuda,
    f32,
    float_of,
    function,
    i64,
    kernel,
    let_next_begin,
    put_f32,
    put_i32,
    put_u8,
    rounded,
    types,
    wait_for_previous,
    warp_max,
)
from rwkv_cli.numbers import GROUP, MOST_LEVEL

TOKENS = 8
"""Tokens of a block of levels, which has one group of columns of each."""
LEVEL_BYTES, FACTOR_BYTES = TOKENS * GROUP * 2, TOKENS * 4
"""Sizes of such a block and of its factors."""
QUADS = GROUP // 4
"""Threads that round a group, each four columns."""
THREADS = 256
"""Most threads of a block of `quantize`."""
_LEVELS = np.float32(MOST_LEVEL)
_PER_LEVEL = np.float32(1 / MOST_LEVEL)


class FactorRow(NamedTuple):
    """A row of the table that `quantize` reads: one matrix [T, K] to round, x or x + delta ∘ mix.

    Strides are in elements from row to row. That of mix is 0 where one row serves all.
    """

    x: Address
    x_stride: Int
    delta: Address
    """0 for x itself."""
    delta_stride: Int
    mix: Address
    mix_stride: Int
    K: Int
    levels: Address
    factors: Address


FACTOR = FactorRow(*range(0, 8 * len(FactorRow._fields), 8))
"""The offset of each column in a row, in bytes."""
_FACTOR_ROW_BYTES = 8 * len(FACTOR)


@function
def _magnitude(y: Float) -> Any:
    """Bits of |y|. They are in the order of the numbers, and what is not finite comes last."""
    return bits(y) & 0x7FFFFFFF


@function
def _level(y: Float, inverse: Float) -> Any:
    return np.int64(rounded(y * inverse))


@function
def levels_at(levels: Address, factors: Address, block: Int) -> Any:
    """The addresses of a block's levels and factors. `block` counts by 8 tokens and then by group."""
    return levels + LEVEL_BYTES * block, factors + FACTOR_BYTES * block


@function
def _inverse(largest: Int) -> Any:
    """Levels to the unit of a group, `largest` being its largest magnitude. Tiny groups have no levels but 0."""
    top = float_of(largest)
    return _LEVELS / top if top > np.float32(1e-30) else np.float32(0)


@function
def _put_factor(factors: Any, token: Int, largest: Int) -> None:
    """Put the factor of a token's group. It is NaN where the largest magnitude is not finite."""
    top = float_of(largest)
    put_f32(factors + 4 * token, top * _PER_LEVEL + top * np.float32(0))


@function
def _put(at: Any, token: Int, quad: Int, largest: Int, columns: Any) -> None:
    """Put four columns of a token, the group's `quad`, into the block at `at`.

    `largest` is the group's largest magnitude.
    """
    levels, factors = at
    y0, y1, y2, y3 = columns
    inverse = _inverse(largest)
    q0, q1, q2, q3 = _level(y0, inverse), _level(y1, inverse), _level(y2, inverse), _level(y3, inverse)
    h0, h1, h2, h3 = (q0 + 128) >> 8, (q1 + 128) >> 8, (q2 + 128) >> 8, (q3 + 128) >> 8
    words = levels + 16 * (token * 4 + quad % 4) + 4 * (quad // 4)
    put_i32(words, (h0 & 255) | (h1 & 255) << 8 | (h2 & 255) << 16 | (h3 & 255) << 24)
    # The lower byte of a level is that of level − 256 · high.
    put_i32(words + 8, (q0 & 255) | (q1 & 255) << 8 | (q2 & 255) << 16 | (q3 & 255) << 24)
    if quad == 0:
        _put_factor(factors, token, largest)


@function
def put_group(y: Float, at: Any, token: Int, puts: Any) -> None:
    """Put a group of a token into the block at `at`, where each lane of a warp has a column. A warp may put none."""
    levels, factors = at
    lane = np.int64(cuda.threadIdx.x) % 32
    largest = warp_max(np.int64(_magnitude(y)))
    if puts:
        level, quad = _level(y, _inverse(largest)), lane // 4
        byte = levels + 16 * (token * 4 + quad % 4) + 4 * (quad // 4) + lane % 4
        put_u8(byte, ((level + 128) >> 8) & 255)
        put_u8(byte + 8, level & 255)
        if lane == 0:
            _put_factor(factors, token, largest)


@function
def operand_of(row: Address) -> Any:
    """The operand of `mixed`, from a row whose first fields are those of a `FactorRow`."""
    x, x_stride, delta = i64(row + FACTOR.x), i64(row + FACTOR.x_stride), i64(row + FACTOR.delta)
    delta_stride, mix = i64(row + FACTOR.delta_stride), i64(row + FACTOR.mix)
    return x, x_stride, delta, delta_stride, mix, i64(row + FACTOR.mix_stride), i64(row + FACTOR.K)


@function
def mixed(operand: Any, t: Int, k: Int) -> Any:
    """Element (t, k) of the matrix of an `operand_of`, and 0 beyond its columns."""
    x, x_stride, delta, delta_stride, mix, mix_stride, K = operand
    if k >= K:
        return np.float32(0)
    y = f32(x + 4 * (x_stride * t + k))
    if delta != 0:
        y += f32(delta + 4 * (delta_stride * t + k)) * f32(mix + 4 * (mix_stride * t + k))
    return y


@kernel(THREADS)
def quantize(table: Address) -> None:
    """Round each matrix of a table of `FactorRow` to levels and factors. Blocks: (groups, T, matrices)."""
    let_next_begin()
    wait_for_previous()
    tops = cuda.shared.array(THREADS, types.int32)
    row = table + _FACTOR_ROW_BYTES * np.int64(cuda.blockIdx.z)
    t, quad, tid = np.int64(cuda.blockIdx.y), np.int64(cuda.grid(1)), cuda.threadIdx.x
    groups, k = (i64(row + FACTOR.K) + GROUP - 1) // GROUP, 4 * quad
    x = operand_of(row)
    y0, y1, y2, y3 = mixed(x, t, k), mixed(x, t, k + 1), mixed(x, t, k + 2), mixed(x, t, k + 3)
    tops[tid] = max(max(_magnitude(y0), _magnitude(y1)), max(_magnitude(y2), _magnitude(y3)))
    cuda.syncthreads()
    if quad < groups * QUADS:
        own = tid - tid % QUADS
        largest = np.int64(tops[own])
        for i in range(1, QUADS):
            largest = max(largest, np.int64(tops[own + i]))
        block = t // TOKENS * groups + quad // QUADS
        at = levels_at(i64(row + FACTOR.levels), i64(row + FACTOR.factors), block)
        _put(at, t % TOKENS, quad % QUADS, largest, (y0, y1, y2, y3))
