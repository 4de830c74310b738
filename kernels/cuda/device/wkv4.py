"""RWKV-4's recurrence on the GPU: a thread has a channel of a sequence. Rows and states are those of `heads`."""

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import (
    Address,
    Int,
    Slot,
    cuda,
    exp,
    f32,
    i64,
    kernel,
    let_next_begin,
    put_f32,
    wait_for_previous,
)

CHANNELS = 64
"""Channels of a block of `wkv4`, each with a thread."""


@kernel(CHANNELS)
def wkv4(
    r: Address,
    k: Address,
    v: Address,
    w: Address,
    u: Address,
    starts: Address,
    state: Slot,
    offset: Int,
    y: Address,
    D: Int,
) -> None:
    """y = r ∘ RWKV-4's average (arXiv 2305.13048, appendix), with w = −exp(time_decay).

    r, k, v and y are [T, D], w and u [D]. A state [3, D] holds numerator and denominator, both scaled by e^{−p}, and
    the running maximum p. Blocks: (D, B).
    """
    let_next_begin()
    wait_for_previous()
    d, b = np.int64(cuda.grid(1)), np.int64(cuda.blockIdx.y)
    if d < D:
        kept = i64(state) + offset + 4 * (3 * D * b + d)
        a, c, p = f32(kept), f32(kept + 4 * D), f32(kept + 8 * D)
        bonus, decay = f32(u + 4 * d), f32(w + 4 * d)
        for t in range(i64(starts + 8 * b), i64(starts + 8 * b + 8)):
            at = 4 * (D * t + d)
            kt, vt = f32(k + at), f32(v + at)
            top = max(p, bonus + kt)
            old, new = exp(p - top), exp(bonus + kt - top)
            put_f32(y + at, f32(r + at) * (old * a + new * vt) / (old * c + new))
            top = max(p + decay, kt)
            old, new = exp(p + decay - top), exp(kt - top)
            a = old * a + new * vt
            c = old * c + new
            p = top
        put_f32(kept, a)
        put_f32(kept + 4 * D, c)
        put_f32(kept + 8 * D, p)
