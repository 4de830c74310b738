"""Rows, gates and activations on the GPU, for float32 matrices [T, D] with a row a token.

Every kernel takes addresses and sizes. T is not among its arguments: it is how many blocks there are in one direction.
"""

from typing import Any

import numpy as np

from rwkv_cli.kernels.cuda.device.codes import code_at
from rwkv_cli.kernels.cuda.device.compile import (
    Address,
    Float,
    Int,
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
    tanh,
    through_half,
    wait_for_previous,
)
from rwkv_cli.kernels.program import ACTIVATIONS
from rwkv_cli.numbers import FLOAT_DTYPES, GROUP

THREADS = 256
"""Most threads of a block of any other kernel here."""
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
