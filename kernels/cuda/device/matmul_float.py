"""y = x · wᵀ on the GPU with w in float: x [T, K] in float32, w [N, K] in float32, float16 or bfloat16, y [T, N].

One token is a matter of reading the weights, 16 bytes a lane. Of many tokens a block takes a tile, whose numbers lie in
shared memory in float32. One launch does all products of a `Linear` with weights of one type.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import (
    Address,
    Int,
    Kernel,
    cuda,
    float_of,
    four,
    function,
    half,
    i64,
    kernel,
    let_next_begin,
    prefetch,
    types,
    wait_for_previous,
    warp_sum,
    words,
)
from rwkv_cli.kernels.cuda.device.levels import FACTOR, FactorRow, mixed, operand_of
from rwkv_cli.kernels.cuda.device.outputs import OutputFields, output_at, put_output
from rwkv_cli.numbers import FLOAT_DTYPES


class FloatRow(NamedTuple):
    """A row of the table that both kernels read. It begins as a `FactorRow` does, and ends with `OutputFields`."""

    x: Address
    x_stride: Int
    delta: Address
    delta_stride: Int
    mix: Address
    mix_stride: Int
    K: Int
    weight: Address
    width: Int
    """K padded to whole groups with zeros: numbers from row to row of the weight."""
    bias: Address
    activation: Int
    add: Int
    y: Address
    y_stride: Int
    N: Int


ROW = FloatRow(*range(0, 8 * len(FloatRow._fields), 8))
"""The offset of each field in a row, in bytes."""
_ROW_BYTES = 8 * len(ROW)
assert FloatRow._fields[: ROW.weight // 8] == FactorRow._fields[: FACTOR.levels // 8]
assert FloatRow._fields[ROW.bias // 8 :] == OutputFields._fields

VECTOR_THREADS, VECTOR_ROWS = 256, 16
"""Threads and outputs of a block of `matvec_float`; a warp has two outputs."""
_DEPTH = 2048
"""Columns of x that its block has in shared memory at a time."""
TILE_THREADS, TILE_ROWS = 128, 64
"""Threads and outputs of a block of `matmul_float`; a thread has eight outputs of some tokens."""
_TILE_DEPTH, _OWN = 32, 8
_TOKEN_LANES = TILE_THREADS * _OWN // TILE_ROWS
"""Threads of a block that have the same outputs, of other tokens."""
TILE_TOKENS = (_TOKEN_LANES, 4 * _TOKEN_LANES)
"""Tokens of a block, for few tokens and for many."""
_F32, _BF16 = FLOAT_DTYPES.index("F32"), FLOAT_DTYPES.index("BF16")


@function
def _two(word: Int, kind: Int) -> Any:
    """The two floats of 16 bits in an int32."""
    if kind == _BF16:
        return float_of(np.int64(word) << 16), float_of(np.int64(word) & 0xFFFF0000)
    return half(word), half(word >> 16)


@function
def _dot(total: Any, weights: Any, x: Any, c: Int, kind: Int) -> Any:
    """total + the products of 16 bytes of weights, as `words` has them, with x[c …] in shared memory."""
    w0, w1, w2, w3 = weights
    x0, x1, x2, x3 = four(x, c)
    if kind == _F32:
        total = total + float_of(np.int64(w0)) * x0 + float_of(np.int64(w1)) * x1
        return total + float_of(np.int64(w2)) * x2 + float_of(np.int64(w3)) * x3
    x4, x5, x6, x7 = four(x, c + 4)
    (a0, a1), (a2, a3), (a4, a5), (a6, a7) = _two(w0, kind), _two(w1, kind), _two(w2, kind), _two(w3, kind)
    total = total + a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
    return total + a4 * x4 + a5 * x5 + a6 * x6 + a7 * x7


@functools.cache
def matvec_float(kind: int) -> Kernel:
    """The kernel for one token and weights of type FLOAT_DTYPES[kind]."""
    SIZE = 4 if kind == _F32 else 2
    LANE = 16 // SIZE
    STEP, WARPS = 32 * LANE, VECTOR_THREADS // 32

    @kernel(VECTOR_THREADS, 2, name=f"matvec_float {FLOAT_DTYPES[kind]}")
    def matvec_float(table: Address) -> None:
        """All products of a table of `FloatRow` with one token. Blocks: (N, products)."""
        let_next_begin()
        x = cuda.shared.array(_DEPTH, types.float32, 16)
        row = table + _ROW_BYTES * np.int64(cuda.blockIdx.y)
        N, width, tid = i64(row + ROW.N), i64(row + ROW.width), np.int64(cuda.threadIdx.x)
        n, lane = VECTOR_ROWS * np.int64(cuda.blockIdx.x) + tid // 32, tid % 32
        if VECTOR_ROWS * np.int64(cuda.blockIdx.x) >= N:
            return
        # Beyond the last output that one is computed again, and nothing is put.
        first = i64(row + ROW.weight) + SIZE * width * min(n, N - 1)
        second = i64(row + ROW.weight) + SIZE * width * min(n + WARPS, N - 1)
        # The first weights come while the launch before ends.
        for i in range(4):
            if lane % 8 == 0 and LANE * lane + i * STEP < width:
                prefetch(first + SIZE * (LANE * lane + i * STEP))
                prefetch(second + SIZE * (LANE * lane + i * STEP))
        wait_for_previous()
        operand, a, b = operand_of(row), np.float32(0), np.float32(0)
        for start in range(0, width, _DEPTH):
            cuda.syncthreads()
            end = min(np.int64(_DEPTH), width - start)
            for k in range(tid, end, VECTOR_THREADS):
                x[k] = mixed(operand, 0, start + k)
            cuda.syncthreads()
            at, c = SIZE * start, LANE * lane
            # Four loads of each output at a time: they are under way together.
            while c + 3 * STEP < end:
                c1, c2, c3 = c + STEP, c + 2 * STEP, c + 3 * STEP
                a0, b0 = words(first + at + SIZE * c), words(second + at + SIZE * c)
                a1, b1 = words(first + at + SIZE * c1), words(second + at + SIZE * c1)
                a2, b2 = words(first + at + SIZE * c2), words(second + at + SIZE * c2)
                a3, b3 = words(first + at + SIZE * c3), words(second + at + SIZE * c3)
                a, b = _dot(a, a0, x, c, kind), _dot(b, b0, x, c, kind)
                a, b = _dot(a, a1, x, c1, kind), _dot(b, b1, x, c1, kind)
                a, b = _dot(a, a2, x, c2, kind), _dot(b, b2, x, c2, kind)
                a, b = _dot(a, a3, x, c3, kind), _dot(b, b3, x, c3, kind)
                c += 4 * STEP
            while c < end:
                a0, b0 = words(first + at + SIZE * c), words(second + at + SIZE * c)
                a, b = _dot(a, a0, x, c, kind), _dot(b, b0, x, c, kind)
                c += STEP
        a, b = warp_sum(a), warp_sum(b)
        output = output_at(row + ROW.bias)
        if lane == 0 and n < N:
            put_output(output, a, 0, n)
        if lane == 0 and n + WARPS < N:
            put_output(output, b, 0, n + WARPS)

    return matvec_float


@functools.cache
def matmul_float(kind: int, tokens: int) -> Kernel:
    """The kernel for several tokens, so many a block, and weights of type FLOAT_DTYPES[kind]."""
    SIZE = 4 if kind == _F32 else 2
    LANE = 16 // SIZE
    VECTORS = _TILE_DEPTH // LANE
    EACH = tokens // _TOKEN_LANES
    WEIGHTS, STRIDE, SUMS = _TILE_DEPTH * TILE_ROWS, tokens + 1, _OWN * EACH
    HELD = WEIGHTS + _TILE_DEPTH * STRIDE
    assert HELD >= SUMS * TILE_THREADS

    @kernel(TILE_THREADS, 2, name=f"matmul_float {FLOAT_DTYPES[kind]} ×{tokens}")
    def matmul_float(table: Address, T: Int) -> None:
        """All products of a table of `FloatRow` with T tokens. Blocks: (N, T, products).

        A thread has 8 outputs of every 16th token. A tile of the weight lies in shared memory as [column, output], and
        behind it one of x as [column, token], a row of which has a number more so that lanes use different banks.
        """
        let_next_begin()
        held = cuda.shared.array(HELD, types.float32, 16)
        sums = cuda.local.array(SUMS, types.float32)
        row = table + _ROW_BYTES * np.int64(cuda.blockIdx.z)
        N, width, tid = i64(row + ROW.N), i64(row + ROW.width), np.int64(cuda.threadIdx.x)
        n, t = TILE_ROWS * np.int64(cuda.blockIdx.x), tokens * np.int64(cuda.blockIdx.y)
        if n >= N:
            return
        weight, operand = i64(row + ROW.weight), operand_of(row)
        own, token = _OWN * (tid // _TOKEN_LANES), tid % _TOKEN_LANES
        for i in range(SUMS):
            sums[i] = np.float32(0)
        wait_for_previous()
        for start in range(0, width, _TILE_DEPTH):
            cuda.syncthreads()
            for i in range(tid, TILE_ROWS * VECTORS, TILE_THREADS):
                out, at = i % TILE_ROWS, i // TILE_ROWS * LANE
                # Beyond the last output that one is read again, and nothing is put.
                stored = words(weight + SIZE * (width * min(n + out, N - 1) + start + at))
                for j in range(4):
                    if kind == _F32:
                        held[np.uint64(TILE_ROWS * (at + j) + out)] = float_of(np.int64(stored[j]))
                    else:
                        lower, upper = _two(stored[j], kind)
                        held[np.uint64(TILE_ROWS * (at + 2 * j) + out)] = lower
                        held[np.uint64(TILE_ROWS * (at + 2 * j + 1) + out)] = upper
            for i in range(tid, _TILE_DEPTH * tokens, TILE_THREADS):
                at, of = i % _TILE_DEPTH, i // _TILE_DEPTH
                y = mixed(operand, t + of, start + at) if t + of < T else np.float32(0)
                held[np.uint64(WEIGHTS + STRIDE * at + of)] = y
            cuda.syncthreads()
            for first in range(0, _TILE_DEPTH, 4):
                for k in range(first, first + 4):
                    left, right = four(held, TILE_ROWS * k + own), four(held, TILE_ROWS * k + own + 4)
                    for e in range(EACH):
                        y = held[np.uint64(WEIGHTS + STRIDE * k + _TOKEN_LANES * e + token)]
                        for j in range(4):
                            sums[_OWN * e + j] += left[j] * y
                            sums[_OWN * e + 4 + j] += right[j] * y
        cuda.syncthreads()
        # The loop below is too long to be unrolled, and registers have no index.
        for i in range(SUMS):
            held[np.uint64(TILE_THREADS * i + tid)] = sums[i]
        output = output_at(row + ROW.bias)
        for i in range(SUMS):
            column, of_token = n + own + i % _OWN, t + _TOKEN_LANES * (i // _OWN) + token
            if column < N and of_token < T:
                put_output(output, held[TILE_THREADS * i + tid], of_token, column)

    return matmul_float
