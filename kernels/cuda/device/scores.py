"""Scores of logits [T, V] on the GPU: a block a row, sums in float64."""

from typing import Any

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import (
    MOST_WARPS,
    Address,
    Float,
    Int,
    block_max,
    block_sum,
    cuda,
    exp,
    f32,
    function,
    i64,
    kernel,
    let_next_begin,
    log,
    put_f64,
    put_u8,
    types,
    wait_for_previous,
)

THREADS = 256
"""Most threads of a block, a multiple of 32."""


@function
def _top(row: Address, V: Int, scratch: Any) -> Any:
    """The largest of V floats at address `row`."""
    top = np.float32(-np.inf)
    for i in range(cuda.threadIdx.x, V, cuda.blockDim.x):
        top = max(top, f32(row + 4 * i))
    return np.float64(block_max(top, scratch))


@function
def _first(row: Address, V: Int, top: Float, scratch: Any) -> Any:
    """The index of the first number that is `top`, or V where none is. It is exact in float64."""
    at = np.float64(V)
    for i in range(cuda.threadIdx.x, V, cuda.blockDim.x):
        if np.float64(f32(row + 4 * i)) == top:
            at = min(at, np.float64(i))
    return -block_max(-at, scratch)


@kernel(THREADS)
def cross_entropy(logits: Address, targets: Address, nll: Address, V: Int) -> None:
    """nll[t] = log Σ_v exp(logits[t, v]) − logits[t, targets[t]].

    logits is [T, V], targets int64 [T], nll float64 [T]. Blocks: (T).
    """
    let_next_begin()
    wait_for_previous()
    narrow = cuda.shared.array(MOST_WARPS, types.float32)
    wide = cuda.shared.array(MOST_WARPS, types.float64)
    t = np.int64(cuda.blockIdx.x)
    row = logits + 4 * V * t
    top = _top(row, V, narrow)
    total = np.float64(0)
    for i in range(cuda.threadIdx.x, V, cuda.blockDim.x):
        total += exp(np.float64(f32(row + 4 * i)) - top)
    total = block_sum(total, wide)
    if cuda.threadIdx.x == 0:
        put_f64(nll + 8 * t, log(total) + top - np.float64(f32(row + 4 * i64(targets + 8 * t))))


@kernel(THREADS)
def divergence(p: Address, q: Address, kl: Address, same: Address, V: Int) -> None:
    """kl[t] = KL(softmax(p[t]) ‖ softmax(q[t])); same[t] says whether both have the same likeliest token.

    p and q are [T, V], kl float64 [T], same bool [T]. Blocks: (T).
    """
    let_next_begin()
    wait_for_previous()
    narrow = cuda.shared.array(MOST_WARPS, types.float32)
    wide = cuda.shared.array(MOST_WARPS, types.float64)
    t = np.int64(cuda.blockIdx.x)
    p_row, q_row = p + 4 * V * t, q + 4 * V * t
    p_top, q_top = _top(p_row, V, narrow), _top(q_row, V, narrow)
    p_first, q_first = _first(p_row, V, p_top, wide), _first(q_row, V, q_top, wide)
    p_total, q_total, cross = np.float64(0), np.float64(0), np.float64(0)
    for i in range(cuda.threadIdx.x, V, cuda.blockDim.x):
        a, b = np.float64(f32(p_row + 4 * i)) - p_top, np.float64(f32(q_row + 4 * i)) - q_top
        e = exp(a)
        p_total += e
        q_total += exp(b)
        cross += e * (a - b)
    p_total, q_total, cross = block_sum(p_total, wide), block_sum(q_total, wide), block_sum(cross, wide)
    if cuda.threadIdx.x == 0:
        put_f64(kl + 8 * t, cross / p_total - log(p_total) + log(q_total))
        put_u8(same + t, 1 if p_first == q_first else 0)
