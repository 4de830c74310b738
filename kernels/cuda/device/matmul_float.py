"""y = x · wᵀ on the GPU with w in float, in plain tiles. It is right, but not fast."""

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import (
    Address,
    Int,
    cuda,
    f32,
    kernel,
    let_next_begin,
    put_f32,
    types,
    wait_for_previous,
)
from rwkv_cli.kernels.cuda.device.elementwise import activate, float_size, stored_float

SIDE = 16
"""Rows and tokens of a block."""
_SQUARE = (SIDE, SIDE + 1)


@kernel(SIDE * SIDE)
def matmul_float(
    x: Address,
    x_stride: Int,
    weight: Address,
    kind: Int,
    bias: Address,
    activation: Int,
    add: Int,
    y: Address,
    y_stride: Int,
    T: Int,
    N: Int,
    K: Int,
) -> None:
    """y = activation(x · wᵀ + bias), or y += that if `add` is not 0, with w [N, K] of FLOAT_DTYPES[kind].

    Strides are in elements from row to row, and a bias of 0 is none. Blocks of 16 × 16 threads: (N, T).
    """
    let_next_begin()
    wait_for_previous()
    left = cuda.shared.array(_SQUARE, types.float32)
    right = cuda.shared.array(_SQUARE, types.float32)
    i, j = np.int64(cuda.threadIdx.x), np.int64(cuda.threadIdx.y)
    n, t = SIDE * np.int64(cuda.blockIdx.x) + i, SIDE * np.int64(cuda.blockIdx.y) + j
    size, total = float_size(kind), np.float32(0)
    for k in range(0, K, SIDE):
        # Neighbouring threads read neighbouring columns, both of x and of the weight.
        row = SIDE * np.int64(cuda.blockIdx.x) + j
        left[j, i] = f32(x + 4 * (x_stride * t + k + i)) if t < T and k + i < K else np.float32(0)
        right[j, i] = stored_float(weight + size * (K * row + k + i), kind) if row < N and k + i < K else np.float32(0)
        cuda.syncthreads()
        for at in range(SIDE):
            total += left[j, at] * right[i, at]
        cuda.syncthreads()
    if n < N and t < T:
        if bias != 0:
            total += f32(bias + 4 * n)
        total = activate(total, activation)
        out = y + 4 * (y_stride * t + n)
        if add != 0:
            total += f32(out)
        put_f32(out, total)
