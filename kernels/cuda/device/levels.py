"""Activations rounded to integers in groups of 32, in the order of fragments (docs/cuda.md).

Integers of 8 bits are one int8 plane, those of 15 bits two: x ≈ level · factor or (256·high + low) · factor. The factor
is max|x| / 127 or max|x| / 32512 of its group, and NaN if an x of the group is not finite.
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
    largest_of_warp,
    let_next_begin,
    low_word,
    put_f32,
    put_i32,
    put_u8,
    rounded,
    types,
    wait_for_previous,
    words,
)
from rwkv_cli.numbers import GROUP, MOST_LEVEL

TOKENS = 8
"""Tokens of a block of levels, which has one group of columns of each."""
PLANE_BYTES, FACTOR_BYTES = TOKENS * GROUP, TOKENS * 4
"""Sizes of a plane of such a block and of its factors."""
PLANES = {8: 1, 15: 2}
"""Planes of levels, by their bits."""
QUADS = GROUP // 4
"""Threads that round a group, each four columns."""
THREADS = 256
"""Most threads of a block of `quantize`."""
_MOST_8, _MOST_15 = np.float32(127), np.float32(MOST_LEVEL)
_PER_LEVEL_8, _PER_LEVEL_15 = np.float32(1 / 127), np.float32(1 / MOST_LEVEL)


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
    planes: Int


FACTOR = FactorRow(*range(0, 8 * len(FactorRow._fields), 8))
"""The offset of each column in a row, in bytes."""
FACTOR_ROW_BYTES = 8 * len(FACTOR)


@function
def magnitude(y: Float) -> Any:
    """Bits of |y|. They are in the order of the numbers, and what is not finite comes last."""
    return bits(y) & 0x7FFFFFFF


@function
def _level(y: Float, inverse: Float) -> Any:
    return np.int64(rounded(y * inverse))


@function
def levels_at(levels: Address, factors: Address, planes: Int, block: Int) -> Any:
    """A block's address, that of its factors, and its planes. `block` counts by 8 tokens and then by group."""
    return levels + PLANE_BYTES * planes * block, factors + FACTOR_BYTES * block, planes


@function
def _inverse(largest: Int, planes: Int) -> Any:
    """Levels to the unit of a group, `largest` being its largest magnitude. Tiny groups have no levels but 0."""
    top = float_of(largest)
    return (_MOST_8 if planes == 1 else _MOST_15) / top if top > np.float32(1e-30) else np.float32(0)


@function
def _put_factor(at: Any, token: Int, largest: Int) -> None:
    """Put the factor of a token's group in a block. It is NaN where the largest magnitude is not finite."""
    _, factors, planes = at
    top = float_of(largest)
    put_f32(factors + 4 * token, top * (_PER_LEVEL_8 if planes == 1 else _PER_LEVEL_15) + top * np.float32(0))


@function
def _place(at: Any, token: Int, quad: Int) -> Any:
    """The address of four columns of a token, the group's `quad`, in a block's first plane. The second is 8 further."""
    levels, _, planes = at
    return levels + 8 * planes * (token * 4 + quad % 4) + 4 * (quad // 4)


@function
def _high(level: Int) -> Any:
    """The high plane of a level: level = 256 · high + low, with low from −128 to 127."""
    return (level + 128) >> 8


@function
def _word(a: Int, b: Int, c: Int, d: Int) -> Any:
    """The lower bytes of four numbers, the first one lowest."""
    return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (d & 255) << 24


@function
def _put(at: Any, token: Int, quad: Int, largest: Int, columns: Any) -> None:
    """Put four columns of a token, the group's `quad`, into the block at `at`.

    `largest` is the group's largest magnitude.
    """
    _, _, planes = at
    y0, y1, y2, y3 = columns
    inverse, place = _inverse(largest, planes), _place(at, token, quad)
    q0, q1, q2, q3 = _level(y0, inverse), _level(y1, inverse), _level(y2, inverse), _level(y3, inverse)
    if planes == 2:
        # The lower byte of a level is that of level − 256 · high.
        put_i32(place + 8, _word(q0, q1, q2, q3))
        q0, q1, q2, q3 = _high(q0), _high(q1), _high(q2), _high(q3)
    put_i32(place, _word(q0, q1, q2, q3))
    if quad == 0:
        _put_factor(at, token, largest)


@function
def lane_levels(place: Address, planes: Int) -> Any:
    """A lane's levels of a block, at its `place` there: the high plane's two int32, then those of the low one or 0."""
    if planes == 2:
        return words(place)
    both = i64(place)
    return low_word(both), low_word(both >> 32), np.int32(0), np.int32(0)


@function
def put_group(y: Float, at: Any, token: Int, puts: Any) -> None:
    """Put a group of a token into the block at `at`, where each lane of a warp has a column. A warp may put none."""
    _, _, planes = at
    lane = np.int64(cuda.threadIdx.x) % 32
    largest = np.int64(largest_of_warp(low_word(magnitude(y))))
    if puts:
        level, byte = _level(y, _inverse(largest, planes)), _place(at, token, lane // 4) + lane % 4
        if planes == 2:
            put_u8(byte + 8, level & 255)
            level = _high(level)
        put_u8(byte, level & 255)
        if lane == 0:
            _put_factor(at, token, largest)


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


@function
def in_quads(operand: Any) -> Any:
    """True if each four columns of an operand's parts lie at a multiple of 16 bytes."""
    x, x_stride, delta, delta_stride, mix, mix_stride, K = operand
    return ((x | delta | mix) % 16 | (x_stride | delta_stride | mix_stride | K) % 4) == 0


@function
def _four(address: Address) -> Any:
    """Four float32 at a multiple of 16, in one load."""
    a, b, c, d = words(address)
    return float_of(np.int64(a)), float_of(np.int64(b)), float_of(np.int64(c)), float_of(np.int64(d))


@function
def four_mixed(operand: Any, t: Int, k: Int, together: Any) -> Any:
    """`mixed` of columns k … k + 3. They are loaded `together` where `in_quads` is true."""
    if not together:
        return mixed(operand, t, k), mixed(operand, t, k + 1), mixed(operand, t, k + 2), mixed(operand, t, k + 3)
    x, x_stride, delta, delta_stride, mix, mix_stride, K = operand
    a = b = c = d = np.float32(0)
    if k < K:
        a, b, c, d = _four(x + 4 * (x_stride * t + k))
        if delta != 0:
            da, db, dc, dd = _four(delta + 4 * (delta_stride * t + k))
            ma, mb, mc, md = _four(mix + 4 * (mix_stride * t + k))
            a, b, c, d = a + da * ma, b + db * mb, c + dc * mc, d + dd * md
    return a, b, c, d


@kernel(THREADS)
def quantize(table: Address) -> None:
    """Round each matrix of a table of `FactorRow` to levels and factors. Blocks: (groups, T, matrices)."""
    let_next_begin()
    wait_for_previous()
    tops = cuda.shared.array(THREADS, types.int32)
    row = table + FACTOR_ROW_BYTES * np.int64(cuda.blockIdx.z)
    t, quad, tid = np.int64(cuda.blockIdx.y), np.int64(cuda.grid(1)), cuda.threadIdx.x
    groups, k = (i64(row + FACTOR.K) + GROUP - 1) // GROUP, 4 * quad
    x = operand_of(row)
    y0, y1, y2, y3 = four_mixed(x, t, k, in_quads(x))
    tops[tid] = max(max(magnitude(y0), magnitude(y1)), max(magnitude(y2), magnitude(y3)))
    cuda.syncthreads()
    if quad < groups * QUADS:
        own = tid - tid % QUADS
        largest = np.int64(tops[own])
        for i in range(1, QUADS):
            largest = max(largest, np.int64(tops[own + i]))
        block = t // TOKENS * groups + quad // QUADS
        at = levels_at(i64(row + FACTOR.levels), i64(row + FACTOR.factors), i64(row + FACTOR.planes), block)
        _put(at, t % TOKENS, quad % QUADS, largest, (y0, y1, y2, y3))
