"""Norms, shifts, mixes and activations on the GPU, for float32 matrices [T, D] with a row a token.

Every kernel takes addresses and sizes. T is not among its arguments: it is how many blocks there are in one direction.
"""

from typing import Any

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import (
    Address,
    Float,
    Int,
    Slot,
    bf16,
    bits,
    block_sum,
    cuda,
    exp,
    f16,
    f32,
    float_of,
    function,
    i8,
    i64,
    kernel,
    put_f32,
    sqrt,
    tanh,
    through_half,
    types,
)
from rwkv_cli.kernels.program import ACTIVATIONS
from rwkv_cli.numbers import FLOAT_DTYPES, GROUP

NORM_THREADS = 512
"""Most threads of a block that sums a row, a multiple of 32."""
THREADS = 256
"""Most threads of a block of any other kernel here."""

_SCRATCH = NORM_THREADS + 32
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


@function
def stored_float(address: Address, kind: Int) -> Any:
    """The float of type FLOAT_DTYPES[kind] at an address."""
    if kind == _F32:
        return f32(address)
    if kind == _BF16:
        return bf16(address)
    return f16(address)


@function
def float_size(kind: Int) -> Any:
    """Bytes of a float of type FLOAT_DTYPES[kind]."""
    return 4 if kind == _F32 else 2


@function
def _statistics(x: Address, D: Int, eps: Float, scratch: Any) -> Any:
    """Mean and 1 / √(variance + eps) of D floats at address x."""
    total = np.float32(0)
    for d in range(cuda.threadIdx.x, D, cuda.blockDim.x):
        total += f32(x + 4 * d)
    mean = block_sum(total, scratch) / np.float32(D)
    square = np.float32(0)
    for d in range(cuda.threadIdx.x, D, cuda.blockDim.x):
        off = f32(x + 4 * d) - mean
        square += off * off
    return mean, _ONE / sqrt(block_sum(square, scratch) / np.float32(D) + eps)


@function
def _normed(x: Address, d: Int, statistics: Any, weight: Address, bias: Address) -> Any:
    """Element d of a row at address x, normed by the row's `_statistics`."""
    mean, scale = statistics
    return (f32(x + 4 * d) - mean) * scale * f32(weight + 4 * d) + f32(bias + 4 * d)


@kernel(NORM_THREADS)
def layer_norm(x: Address, weight: Address, bias: Address, out: Address, eps: Float, D: Int) -> None:
    """out[t] = (x[t] − mean) / √(variance + eps) · weight + bias.

    x and out are [T, D], weight and bias [D]. Blocks: (T), each for a row.
    """
    scratch = cuda.shared.array(_SCRATCH, types.float32)
    row = 4 * D * cuda.blockIdx.x
    statistics = _statistics(x + row, D, eps, scratch)
    for d in range(cuda.threadIdx.x, D, cuda.blockDim.x):
        put_f32(out + row + 4 * d, _normed(x + row, d, statistics, weight, bias))


@function
def _sequence_of(t: Int, starts: Address, B: Int, found: Any) -> Any:
    """The sequence that has row t, in every thread: b with starts[b] ≤ t < starts[b + 1]. `found` is shared."""
    for b in range(cuda.threadIdx.x, B, cuda.blockDim.x):
        if i64(starts + 8 * b) <= t and t < i64(starts + 8 * b + 8):
            found[0] = b
    cuda.syncthreads()
    return found[0]


@kernel(NORM_THREADS)
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

    x, out and delta are [T, D]; starts is int64 [B + 1]. The row before the first one of sequence b is row b of a state
    [B, D], which lies last_offset bytes after the address at `last`. Blocks: (T), each for a row.

    The block of a sequence's first row, and no other, then puts its last normed row into the state. For this it works
    that row out again, so no block reads what another has written.
    """
    scratch = cuda.shared.array(_SCRATCH, types.float32)
    t, first, step = np.int64(cuda.blockIdx.x), cuda.threadIdx.x, cuda.blockDim.x
    here = x + 4 * D * t
    statistics = _statistics(here, D, eps, scratch)
    b = _sequence_of(t, starts, B, cuda.shared.array(1, types.int64))
    if t > i64(starts + 8 * b):
        there = x + 4 * D * (t - 1)
        earlier = _statistics(there, D, eps, scratch)
        for d in range(first, D, step):
            a = _normed(here, d, statistics, weight, bias)
            put_f32(out + 4 * (D * t + d), a)
            put_f32(delta + 4 * (D * t + d), _normed(there, d, earlier, weight, bias) - a)
    else:
        there = x + 4 * D * (i64(starts + 8 * b + 8) - 1)
        final = _statistics(there, D, eps, scratch)
        kept = i64(last) + last_offset + 4 * D * b
        for d in range(first, D, step):
            a = _normed(here, d, statistics, weight, bias)
            put_f32(out + 4 * (D * t + d), a)
            put_f32(delta + 4 * (D * t + d), f32(kept + 4 * d) - a)
            put_f32(kept + 4 * d, _normed(there, d, final, weight, bias))


@kernel(THREADS)
def shift(x: Address, delta: Address, starts: Address, last: Slot, last_offset: Int, B: Int, D: Int) -> None:
    """The token shift of x itself. The arguments and blocks are those of `norm_shift`."""
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
def lerp(
    x: Address, x_stride: Int, delta: Address, delta_stride: Int, mix: Address, mix_stride: Int, out: Address, K: Int
) -> None:
    """out = x + delta ∘ mix, all [T, K]. Blocks: (K, T), a thread a column.

    Strides are in elements from row to row. That of mix is 0 where one row serves all.
    """
    k, t = np.int64(cuda.grid(1)), np.int64(cuda.blockIdx.y)
    if k < K:
        y = f32(x + 4 * (x_stride * t + k))
        y += f32(delta + 4 * (delta_stride * t + k)) * f32(mix + 4 * (mix_stride * t + k))
        put_f32(out + 4 * (K * t + k), y)


@kernel(THREADS)
def add_gated(x: Address, y: Address, gate: Address, D: Int) -> None:
    """x += y ∘ gate, all [T, D]. Blocks: (D, T), a thread a column."""
    d = np.int64(cuda.grid(1))
    if d < D:
        at = 4 * (D * np.int64(cuda.blockIdx.y) + d)
        put_f32(x + at, f32(x + at) + f32(y + at) * f32(gate + at))


@kernel(THREADS)
def gate(x: Address, gate: Address, D: Int) -> None:
    """x ∘= gate, both [T, D]. Blocks: (D, T), a thread a column."""
    d = np.int64(cuda.grid(1))
    if d < D:
        at = 4 * (D * np.int64(cuda.blockIdx.y) + d)
        put_f32(x + at, f32(x + at) * f32(gate + at))


@kernel(THREADS)
def row_products(x: Address, matrices: Address, out: Address, K: Int, N: Int) -> None:
    """out[t] = x[t] · M[t], where M[t] [K, N] is row t of matrices. Blocks: (N, T), a thread a column.

    x is [T, K], matrices [T, K · N] and out [T, N].
    """
    n, t = np.int64(cuda.grid(1)), np.int64(cuda.blockIdx.y)
    if n < N:
        total = np.float32(0)
        for k in range(K):
            total += f32(x + 4 * (K * t + k)) * f32(matrices + 4 * (N * (K * t + k) + n))
        put_f32(out + 4 * (N * t + n), total)


@kernel(THREADS)
def round_to(x: Address, kind: Int, D: Int) -> None:
    """x [T, D] becomes the nearest F16 or BF16 numbers, ties to even. Blocks: (D, T), a thread a column."""
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
    d, i = np.int64(cuda.grid(1)), np.int64(cuda.blockIdx.y)
    if d < D:
        put_f32(out + 4 * (D * i + d), f32(x + 4 * (D * i64(rows + 8 * i) + d)))


@kernel(THREADS)
def embed_int8(ids: Address, values: Address, scales: Address, unit: Float, out: Address, D: Int, width: Int) -> None:
    """out[t] = row ids[t] of values · scales · unit. Blocks: (D, T), a thread a column.

    ids is int64 [T], values int8 [V, width], scales float16 [V, width / GROUP], out [T, D].
    """
    d, t = np.int64(cuda.grid(1)), np.int64(cuda.blockIdx.y)
    if d < D:
        row = i64(ids + 8 * t)
        scale = f16(scales + 2 * (row * (width // GROUP) + d // GROUP)) * unit
        put_f32(out + 4 * (D * t + d), np.float32(i8(values + row * width + d)) * scale)


@kernel(THREADS)
def embed_float(ids: Address, table: Address, kind: Int, out: Address, D: Int) -> None:
    """out[t] = row ids[t] of a table [V, D] of FLOAT_DTYPES[kind]. Blocks: (D, T), a thread a column."""
    d, t = np.int64(cuda.grid(1)), np.int64(cuda.blockIdx.y)
    if d < D:
        at = table + float_size(kind) * (D * i64(ids + 8 * t) + d)
        put_f32(out + 4 * (D * t + d), stored_float(at, kind))
