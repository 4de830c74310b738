"""Activations rounded to int16 in groups of 32, as two int8 planes in the order of fragments (docs/cuda.md).

x ≈ (256·high + low) · factor, factor = max|x| / 32512 of its group, NaN if an x of the group is not finite. Either a
launch rounds all inputs of a `linear`, or the kernel that makes an activation puts its levels beside it.
"""

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import (
    bits,
    cuda,
    f32,
    float_of,
    function,
    i64,
    kernel,
    put_f32,
    put_i32,
    rounded,
    types,
)

INPUT = 9
"""Numbers, int64, in a row of the table of inputs: x, its stride, delta (0: none), its stride, mix, its stride (0: one
row), K, levels, factors."""
LEVEL_BYTES, FACTOR_BYTES = 512, 32
"""Of 8 tokens and a group of 32 columns."""
THREADS = 256
"""Of `quantize`, at most; 8 threads a group."""
_LEVELS = np.float32(32512)  # 127 · 256: both byte planes of any level fit in int8
_PER_LEVEL = np.float32(1 / 32512)


@function
def _magnitude(y):  # type: ignore[no-untyped-def]
    """Bits of |y|: they order as the numbers do, and what is not finite comes last."""
    return bits(y) & 0x7FFFFFFF


@function
def _level(y, inverse):  # type: ignore[no-untyped-def]
    return np.int64(rounded(y * inverse))


@function
def _put(levels, factors, block, t, quad, largest, y0, y1, y2, y3):  # type: ignore[no-untyped-def]
    """Four columns, the `quad`-th of a group, of token t; `block` counts tokens' eights × groups; `largest`: bits."""
    top = float_of(largest)
    inverse = _LEVELS / top if top > np.float32(1e-30) else np.float32(0)
    q0, q1, q2, q3 = _level(y0, inverse), _level(y1, inverse), _level(y2, inverse), _level(y3, inverse)
    h0, h1, h2, h3 = (q0 + 128) >> 8, (q1 + 128) >> 8, (q2 + 128) >> 8, (q3 + 128) >> 8
    at = levels + LEVEL_BYTES * block + 16 * (t % 8 * 4 + quad % 4) + 4 * (quad // 4)
    put_i32(at, (h0 & 255) | (h1 & 255) << 8 | (h2 & 255) << 16 | (h3 & 255) << 24)
    # the lower byte of a level is that of level − 256 · high
    put_i32(at + 8, (q0 & 255) | (q1 & 255) << 8 | (q2 & 255) << 16 | (q3 & 255) << 24)
    if quad == 0:
        put_f32(factors + FACTOR_BYTES * block + 4 * (t % 8), top * _PER_LEVEL + top * np.float32(0))


@function
def put_levels(values, first, quad, levels, factors, block, t):  # type: ignore[no-untyped-def]
    """`_put` for one of the 8 threads of a group whose numbers are values[first] to values[first + 31] (shared)."""
    largest = _magnitude(values[first])
    for i in range(1, 32):
        largest = max(largest, _magnitude(values[first + i]))
    at = first + 4 * quad
    _put(levels, factors, block, t, quad, largest, values[at], values[at + 1], values[at + 2], values[at + 3])


@function
def _mixed(row, t, k):  # type: ignore[no-untyped-def]
    """Element (t, k) of the input whose facts are at `row`: x, or x + delta ∘ mix; 0 beyond its columns."""
    if k >= i64(row + 48):
        return np.float32(0)
    y = f32(i64(row) + 4 * (i64(row + 8) * t + k))
    if i64(row + 16) != 0:
        y += f32(i64(row + 16) + 4 * (i64(row + 24) * t + k)) * f32(i64(row + 32) + 4 * (i64(row + 40) * t + k))
    return y


@kernel("i", THREADS)
def quantize(inputs):  # type: ignore[no-untyped-def]
    """Inputs to levels and factors. Blocks: (groups, T, inputs)."""
    tops = cuda.shared.array(THREADS, types.int32)
    row = inputs + 8 * INPUT * np.int64(cuda.blockIdx.z)
    t, quad, tid = np.int64(cuda.blockIdx.y), np.int64(cuda.grid(1)), cuda.threadIdx.x
    groups, k = (i64(row + 48) + 31) // 32, 4 * quad
    y0, y1, y2, y3 = _mixed(row, t, k), _mixed(row, t, k + 1), _mixed(row, t, k + 2), _mixed(row, t, k + 3)
    tops[tid] = max(max(_magnitude(y0), _magnitude(y1)), max(_magnitude(y2), _magnitude(y3)))
    cuda.syncthreads()
    if quad < groups * 8:
        largest = np.int64(tops[tid - tid % 8])
        for i in range(1, 8):
            largest = max(largest, np.int64(tops[tid - tid % 8 + i]))
        block = t // 8 * groups + quad // 8
        _put(i64(row + 56), i64(row + 64), block, t, quad % 8, largest, y0, y1, y2, y3)
