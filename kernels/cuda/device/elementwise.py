"""Norms, shifts, mixes and activations on the GPU, for float32 matrices [T, D] with a row a token.

Every kernel takes addresses and sizes. T is not among its arguments: it is how many blocks there are in one direction.
"""

import functools
from typing import Any

import numpy as np

from rwkv_cli.kernels.cuda.device.codes import code_at
from rwkv_cli.kernels.cuda.device.compile import (
    MOST_WARPS,
    Address,
    Float,
    Int,
    Kernel,
    Slot,
    bf16,
    bits,
    cuda,
    exp,
    f16,
    f32,
    float_of,
    function,
    i8,
    i64,
    kernel,
    let_next_begin,
    put_f32,
    sqrt,
    tanh,
    through_half,
    types,
    wait_for_previous,
    warp_sums,
)
from rwkv_cli.kernels.program import ACTIVATIONS
from rwkv_cli.numbers import FLOAT_DTYPES, GROUP

THREADS = 256
"""Most threads of a block of any other kernel here."""
_MOST_THREADS = 512
"""Threads of a block that norms a row. More would leave too few registers for what each keeps of a wide row."""
_ONE = np.float32(1)
_SOFT = np.float32(-0.606530659712633)  # −e^{−1/2}
_SIGMOID, _SILU, _TANH = ACTIVATIONS.index("sigmoid"), ACTIVATIONS.index("silu"), ACTIVATIONS.index("tanh")
_RELU_SQUARED, _DECAY = ACTIVATIONS.index("relu_squared"), ACTIVATIONS.index("decay")
_SOFT_DECAY = ACTIVATIONS.index("soft_decay")
_F32, _BF16, _F16 = FLOAT_DTYPES.index("F32"), FLOAT_DTYPES.index("BF16"), FLOAT_DTYPES.index("F16")


@function
def activate(x: Float, kind: Int) -> Any:
    """ACTIVATIONS[kind] of x. NaN stays NaN."""
    if kind == _SIGMOID:
        return _ONE / (_ONE + exp(-x))
    if kind == _SILU:
        return x / (_ONE + exp(-x))
    if kind == _TANH:
        return tanh(x)
    if kind == _RELU_SQUARED:
        return np.float32(0) if x <= np.float32(0) else x * x
    if kind == _DECAY:
        return exp(-exp(x))
    if kind == _SOFT_DECAY:
        return exp(_SOFT / (_ONE + exp(-x)))
    return x


def norm_threads(D: int) -> int:
    """Threads of a block that norms a row of D columns: whole warps, one column each as far as that goes."""
    return min(_MOST_THREADS, -(-D // 32) * 32)


@function
def _two_sums(pair: Any, scratch: Any) -> None:
    """The sums of both numbers of a pair over a block, in every thread's pair.

    `scratch`, in shared memory, is for this call alone.
    """
    lane, warp, warps = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32, cuda.blockDim.x // 32
    warp_sums(pair, 2)
    if lane == 0:
        scratch[0, warp], scratch[1, warp] = pair[0], pair[1]
    cuda.syncthreads()
    pair[0] = scratch[0, lane] if lane < warps else np.float32(0)
    pair[1] = scratch[1, lane] if lane < warps else np.float32(0)
    warp_sums(pair, 2)


@functools.cache
def layer_norm(D: int) -> Kernel:
    """The kernel for rows of D columns."""
    THREADS, COUNT, SCRATCH = norm_threads(D), -(-D // norm_threads(D)), (2, MOST_WARPS)

    @kernel(THREADS, name=f"layer_norm ×{COUNT}")
    def layer_norm(x: Address, weight: Address, bias: Address, out: Address, eps: Float, D: Int) -> None:
        """out[t] = (x[t] − mean) / √(variance + eps) · weight + bias.

        x and out are [T, D], weight and bias [D]. Blocks: (T), each for a row, which its threads keep in registers.
        """
        let_next_begin()
        sums = cuda.shared.array(SCRATCH, types.float32)
        squares = cuda.shared.array(SCRATCH, types.float32)
        own, weights = cuda.local.array(COUNT, types.float32), cuda.local.array(COUNT, types.float32)
        biases, pair = cuda.local.array(COUNT, types.float32), cuda.local.array(2, types.float32)
        row, tid = 4 * D * np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x)
        for i in range(COUNT):
            d = tid + THREADS * i
            weights[i] = f32(weight + 4 * d) if d < D else np.float32(0)
            biases[i] = f32(bias + 4 * d) if d < D else np.float32(0)
        wait_for_previous()
        pair[0] = pair[1] = np.float32(0)
        for i in range(COUNT):
            d = tid + THREADS * i
            own[i] = f32(x + row + 4 * d) if d < D else np.float32(0)
            pair[0] += own[i]
        _two_sums(pair, sums)
        mean, pair[0] = pair[0] / np.float32(D), np.float32(0)
        for i in range(COUNT):
            if tid + THREADS * i < D:
                own[i] -= mean
                pair[0] += own[i] * own[i]
        _two_sums(pair, squares)
        scale = _ONE / sqrt(pair[0] / np.float32(D) + eps)
        for i in range(COUNT):
            d = tid + THREADS * i
            if d < D:
                put_f32(out + row + 4 * d, own[i] * scale * weights[i] + biases[i])

    return layer_norm


@function
def _sequence_of(t: Int, starts: Address, B: Int, found: Any) -> Any:
    """The sequence that has row t, in every thread: b with starts[b] ≤ t < starts[b + 1]. `found` is shared."""
    if B == 1:
        return np.int64(0)
    for b in range(cuda.threadIdx.x, B, cuda.blockDim.x):
        if i64(starts + 8 * b) <= t and t < i64(starts + 8 * b + 8):
            found[0] = b
    cuda.syncthreads()
    return found[0]


@functools.cache
def norm_shift(D: int) -> Kernel:
    """The kernel for rows of D columns."""
    THREADS, COUNT, SCRATCH = norm_threads(D), -(-D // norm_threads(D)), (2, MOST_WARPS)

    @kernel(THREADS, name=f"norm_shift ×{COUNT}")
    def norm_shift(
        x: Address,
        weight: Address,
        bias: Address,
        out: Address,
        delta: Address,
        starts: Address,
        last: Slot,
        last_offset: Int,
        eps: Float,
        B: Int,
        D: Int,
    ) -> None:
        """`layer_norm` of x to out, and the token shift of out: delta[t] = out[t − 1] − out[t].

        x, out and delta are [T, D]; starts is int64 [B + 1]. The row before the first one of sequence b is row b of a
        state [B, D], which lies last_offset bytes after the address at `last`. Blocks: (T), each for a row, which its
        threads keep in registers.

        A block works out the row before its own again, so none reads what another has written. The block of a
        sequence's first row, and no other, works out the sequence's last row instead and puts it into the state.
        """
        let_next_begin()
        sums = cuda.shared.array(SCRATCH, types.float32)
        squares = cuda.shared.array(SCRATCH, types.float32)
        own, other = cuda.local.array(COUNT, types.float32), cuda.local.array(COUNT, types.float32)
        weights, biases = cuda.local.array(COUNT, types.float32), cuda.local.array(COUNT, types.float32)
        pair, found = cuda.local.array(2, types.float32), cuda.shared.array(1, types.int64)
        t, tid = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x)
        for i in range(COUNT):
            d = tid + THREADS * i
            weights[i] = f32(weight + 4 * d) if d < D else np.float32(0)
            biases[i] = f32(bias + 4 * d) if d < D else np.float32(0)
        wait_for_previous()
        kept = i64(last) + last_offset
        for i in range(COUNT):
            d = tid + THREADS * i
            own[i] = f32(x + 4 * (D * t + d)) if d < D else np.float32(0)
        b = _sequence_of(t, starts, B, found)
        kept += 4 * D * b
        begins = t == i64(starts + 8 * b)
        there = i64(starts + 8 * b + 8) - 1 if begins else t - 1
        pair[0] = pair[1] = np.float32(0)
        for i in range(COUNT):
            d = tid + THREADS * i
            other[i] = f32(x + 4 * (D * there + d)) if d < D else np.float32(0)
            pair[0] += own[i]
            pair[1] += other[i]
        _two_sums(pair, sums)
        mean, mean_other = pair[0] / np.float32(D), pair[1] / np.float32(D)
        pair[0] = pair[1] = np.float32(0)
        for i in range(COUNT):
            if tid + THREADS * i < D:
                own[i] -= mean
                other[i] -= mean_other
                pair[0] += own[i] * own[i]
                pair[1] += other[i] * other[i]
        _two_sums(pair, squares)
        scale, scale_other = _ONE / sqrt(pair[0] / np.float32(D) + eps), _ONE / sqrt(pair[1] / np.float32(D) + eps)
        for i in range(COUNT):
            d = tid + THREADS * i
            if d < D:
                a, before = own[i] * scale * weights[i] + biases[i], other[i] * scale_other * weights[i] + biases[i]
                put_f32(out + 4 * (D * t + d), a)
                if begins:
                    put_f32(delta + 4 * (D * t + d), f32(kept + 4 * d) - a)
                    put_f32(kept + 4 * d, before)
                else:
                    put_f32(delta + 4 * (D * t + d), before - a)

    return norm_shift


@kernel(THREADS)
def shift(x: Address, delta: Address, starts: Address, last: Slot, last_offset: Int, B: Int, D: Int) -> None:
    """The token shift of x itself. The arguments and blocks are those of `norm_shift`."""
    let_next_begin()
    wait_for_previous()
    t = np.int64(cuda.blockIdx.x)
    b = _sequence_of(t, starts, B, cuda.shared.array(1, types.int64))
    begin, end = i64(starts + 8 * b), i64(starts + 8 * b + 8)
    for d in range(cuda.threadIdx.x, D, cuda.blockDim.x):
        at = x + 4 * (D * t + d)
        a = f32(at)
        if t > begin:
            put_f32(delta + 4 * (D * t + d), f32(at - 4 * D) - a)
        else:
            kept = i64(last) + last_offset + 4 * (D * b + d)
            put_f32(delta + 4 * (D * t + d), f32(kept) - a)
            put_f32(kept, f32(x + 4 * (D * (end - 1) + d)))


@kernel(THREADS)
def add_gated(x: Address, y: Address, gate: Address, D: Int) -> None:
    """x += y ∘ gate, all [T, D]. Blocks: (D, T), a thread a column."""
    let_next_begin()
    wait_for_previous()
    d = np.int64(cuda.grid(1))
    if d < D:
        at = 4 * (D * np.int64(cuda.blockIdx.y) + d)
        put_f32(x + at, f32(x + at) + f32(y + at) * f32(gate + at))


@kernel(THREADS)
def gate(x: Address, gate: Address, D: Int) -> None:
    """x ∘= gate, both [T, D]. Blocks: (D, T), a thread a column."""
    let_next_begin()
    wait_for_previous()
    d = np.int64(cuda.grid(1))
    if d < D:
        at = 4 * (D * np.int64(cuda.blockIdx.y) + d)
        put_f32(x + at, f32(x + at) * f32(gate + at))


@kernel(THREADS)
def row_products(x: Address, matrices: Address, out: Address, K: Int, N: Int) -> None:
    """out[t] = x[t] · M[t], where M[t] [K, N] is row t of matrices. Blocks: (N, T), a thread a column.

    x is [T, K], matrices [T, K · N] and out [T, N].
    """
    let_next_begin()
    wait_for_previous()
    n, t = np.int64(cuda.grid(1)), np.int64(cuda.blockIdx.y)
    if n < N:
        total = np.float32(0)
        for k in range(K):
            total += f32(x + 4 * (K * t + k)) * f32(matrices + 4 * (N * (K * t + k) + n))
        put_f32(out + 4 * (N * t + n), total)


@kernel(THREADS)
def round_to(x: Address, kind: Int, D: Int) -> None:
    """x [T, D] becomes the nearest F16 or BF16 numbers, ties to even. Blocks: (D, T), a thread a column."""
    let_next_begin()
    wait_for_previous()
    d = np.int64(cuda.grid(1))
    if d < D:
        at = x + 4 * (D * np.int64(cuda.blockIdx.y) + d)
        y = f32(at)
        if kind == _F16:
            y = through_half(y)
        elif kind == _BF16 and y == y:  # the carry would turn a NaN into infinity
            low = bits(y)
            y = float_of((low + 0x7FFF + ((low >> 16) & 1)) & 0xFFFF0000)
        put_f32(at, y)


@kernel(THREADS)
def take(x: Address, rows: Address, out: Address, D: Int) -> None:
    """out[i] = x[rows[i]]: x [T, D], rows int64 [E], out [E, D]. Blocks: (D, E), a thread a column."""
    let_next_begin()
    wait_for_previous()
    d, i = np.int64(cuda.grid(1)), np.int64(cuda.blockIdx.y)
    if d < D:
        put_f32(out + 4 * (D * i + d), f32(x + 4 * (D * i64(rows + 8 * i) + d)))


@kernel(THREADS)
def embed_int8(ids: Address, values: Address, scales: Address, unit: Float, out: Address, D: Int, width: Int) -> None:
    """out[t] = row ids[t] of values · scales · unit. Blocks: (D, T), a thread a column.

    ids is int64 [T], values int8 [V, width], scales float16 [V, width / GROUP], out [T, D].
    """
    let_next_begin()
    wait_for_previous()
    d, t = np.int64(cuda.grid(1)), np.int64(cuda.blockIdx.y)
    if d < D:
        row = i64(ids + 8 * t)
        scale = f16(scales + 2 * (row * (width // GROUP) + d // GROUP)) * unit
        put_f32(out + 4 * (D * t + d), np.float32(i8(values + row * width + d)) * scale)


@kernel(THREADS)
def embed_codes(
    ids: Address, values: Address, scales: Address, rows: Address, levels: Address, bits: Int, out: Address, D: Int
) -> None:
    """out[t] = row ids[t] of a table: levels[code] · (scale · row). Blocks: (D, T), a thread a column.

    ids is int64 [T], values are codes [V, G, 4·bits] with G = ⌈D/GROUP⌉, scales int8 [V, G], rows float32 [V], levels
    float32 [2^bits], out [T, D].
    """
    let_next_begin()
    wait_for_previous()
    d, t = np.int64(cuda.grid(1)), np.int64(cuda.blockIdx.y)
    if d < D:
        row = i64(ids + 8 * t)
        group = row * ((D + GROUP - 1) // GROUP) + d // GROUP
        code = code_at(values + 4 * bits * group, 4, d % GROUP // 4, d % 4, bits)
        scale = np.float32(i8(scales + group)) * f32(rows + 4 * row)
        put_f32(out + 4 * (D * t + d), f32(levels + 4 * code) * scale)


@kernel(THREADS)
def embed_float(ids: Address, table: Address, kind: Int, out: Address, D: Int, width: Int) -> None:
    """out[t] = row ids[t] of a table [V, width] of FLOAT_DTYPES[kind]. Blocks: (D, T), a thread a column."""
    let_next_begin()
    wait_for_previous()
    d, t = np.int64(cuda.grid(1)), np.int64(cuda.blockIdx.y)
    if d < D:
        at = width * i64(ids + 8 * t) + d
        if kind == _F32:
            y = f32(table + 4 * at)
        elif kind == _BF16:
            y = bf16(table + 2 * at)
        else:
            y = f16(table + 2 * at)
        put_f32(out + 4 * (D * t + d), y)
