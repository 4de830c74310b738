"""The recurrences on the GPU: a block has a head of a sequence and goes through its tokens, the state in registers.

Rows are those of B sequences, and `starts` is int64 [B + 1]. The states begin `offset` bytes after the address at
`state`. A matrix S [N, N] is [key, value]: thread j of a part has its share of column j, so neighbours read neighbours.
"""

import functools
from typing import Any

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import (
    Address,
    Float,
    Int,
    Kernel,
    Slot,
    block_sum,
    cuda,
    exp,
    f32,
    function,
    i64,
    kernel,
    put_f32,
    sqrt,
    types,
)
from rwkv_cli.kernels.cuda.device.levels import QUADS, TOKENS, levels_at, put_levels
from rwkv_cli.numbers import GROUP

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


def parts(N: int) -> int:
    """How many threads share a column of N keys. A block has `parts` · N threads, rounded up to whole warps."""
    return 4 if N % 4 == 0 and N <= 256 else 1


def threads(N: int) -> int:
    """Threads of a block for heads of size N: at most 992, since the scratch has 32 more."""
    return -(-N * parts(N) // 32) * 32


@function
def _column(sums: Any, N: Int, shares: Int, j: Int) -> Any:
    """The sum of column j's parts."""
    total = sums[j]
    for part in range(1, shares):
        total += sums[part * N + j]
    return total


def puts_levels(N: int) -> bool:
    """True if heads of size N are whole groups. Their kernel can then put levels."""
    return N % GROUP == 0


@function
def _put_head(values: Any, out: Float, N: Int, at: Any, token: Int) -> None:
    """Put the levels of a head's outputs for one token into the blocks at `at`.

    Each of the first N threads has its output in `out`. `values` is shared memory.
    """
    tid = np.int64(cuda.threadIdx.x)
    values[tid] = out
    cuda.syncthreads()
    if tid < N // 4:
        levels, factors = at
        group = tid // QUADS
        put_levels(values, GROUP * group, tid % QUADS, levels_at(levels, factors, group), token)


@functools.cache
def wkv6(N: int) -> Kernel:
    """The kernel for heads of size N."""
    P, B = parts(N), threads(N)
    ROWS, SCRATCH, SHARED = N // P, B + 32, (4, N)

    @kernel(B, name=f"wkv6 N={N}")
    def wkv6(
        r: Address,
        k: Address,
        v: Address,
        w: Address,
        w_stride: Int,
        u: Address,
        weight: Address,
        bias: Address,
        gate: Address,
        eps: Float,
        starts: Address,
        state: Slot,
        offset: Int,
        y: Address,
        levels: Address,
        factors: Address,
        D: Int,
    ) -> None:
        """RWKV-5 and 6 (arXiv 2404.05892, section 4.1), normed by head, ∘ gate if there is one:

            y = norm(r·(S + diag(u)·kᵀv)) ∘ gate · S ← diag(w)·S + kᵀv

        r, k, v, gate and y are [T, D], u, weight and bias [D], w [T, D] with w_stride = D or [1, D] with 0. A state S
        is [H, N, N]. Levels and factors of y are put too, if their addresses are not 0. Blocks: (H, B).
        """
        rk = cuda.shared.array(SHARED, types.float32)
        sums = cuda.shared.array(B, types.float32)
        scratch = cuda.shared.array(SCRATCH, types.float32)
        S = cuda.local.array(ROWS, types.float32)
        h, b, tid = np.int64(cuda.blockIdx.x), np.int64(cuda.blockIdx.y), np.int64(cuda.threadIdx.x)
        j, part, active = tid % N, tid // N, tid < N * P
        first = part * ROWS
        kept = i64(state) + offset + 4 * N * N * (b * (D // N) + h)
        if active:
            for i in range(ROWS):
                S[i] = f32(kept + 4 * (N * (first + i) + j))
        channel = h * N + j
        scale, shift = f32(weight + 4 * channel), f32(bias + 4 * channel)
        for t in range(i64(starts + 8 * b), i64(starts + 8 * b + 8)):
            at = 4 * (D * t + channel)
            if tid < N:
                rk[0, j], rk[1, j] = f32(r + at), f32(k + at)
                rk[2, j], rk[3, j] = f32(w + 4 * (w_stride * t + channel)), f32(u + 4 * channel)
            cuda.syncthreads()
            value, total = f32(v + at), np.float32(0)
            if active:
                for i in range(ROWS):
                    kv = rk[1, first + i] * value
                    total += rk[0, first + i] * (rk[3, first + i] * kv + S[i])
                    S[i] = rk[2, first + i] * S[i] + kv
            sums[tid] = total
            cuda.syncthreads()
            out = _column(sums, N, P, j)
            mean = block_sum(out if tid < N else np.float32(0), scratch) / np.float32(N)
            off = out - mean
            spread = block_sum(off * off if tid < N else np.float32(0), scratch) / np.float32(N)
            if tid < N:
                out = off / sqrt(spread + eps) * scale + shift
                if gate != 0:
                    out *= f32(gate + at)
                put_f32(y + at, out)
            if levels != 0:
                block = t // TOKENS * (D // GROUP) + h * (N // GROUP)
                _put_head(sums, out, N, levels_at(levels, factors, block), t % TOKENS)
        if active:
            for i in range(ROWS):
                put_f32(kept + 4 * (N * (first + i) + j), S[i])

    return wkv6


@functools.cache
def wkv7(N: int) -> Kernel:
    """The kernel for heads of size N."""
    P, B = parts(N), threads(N)
    ROWS, SCRATCH, SHARED = N // P, B + 32, (5, N)

    @kernel(B, name=f"wkv7 N={N}")
    def wkv7(
        r: Address,
        w: Address,
        k: Address,
        v: Address,
        a: Address,
        g: Address,
        v_first: Address,
        v_gate: Address,
        k_k: Address,
        k_a: Address,
        r_k: Address,
        weight: Address,
        bias: Address,
        eps: Float,
        starts: Address,
        state: Slot,
        offset: Int,
        y: Address,
        levels: Address,
        factors: Address,
        D: Int,
    ) -> None:
        """RWKV-7 (arXiv 2503.14456, section 4), as `program.Wkv7` says:

            S ← diag(w)·S − (κ∘a)ᵀ·(κ·S) + kᵀv · y = (norm(r·S) + (Σ r∘k∘r_k) · v) ∘ g

        r, w, k, v, a, g, v_first, v_gate and y are [T, D], k_k, k_a, r_k, weight and bias [D]. A state S is [H, N, N].
        There is no value residual if v_first is 0. Levels and factors are those of `wkv6`. Blocks: (H, B).
        """
        rows = cuda.shared.array(SHARED, types.float32)  # r, w, k, κ before its norm, κ∘a likewise
        sums = cuda.shared.array(B, types.float32)
        scratch = cuda.shared.array(SCRATCH, types.float32)
        S = cuda.local.array(ROWS, types.float32)
        h, b, tid = np.int64(cuda.blockIdx.x), np.int64(cuda.blockIdx.y), np.int64(cuda.threadIdx.x)
        j, part, active = tid % N, tid // N, tid < N * P
        first = part * ROWS
        kept = i64(state) + offset + 4 * N * N * (b * (D // N) + h)
        if active:
            for i in range(ROWS):
                S[i] = f32(kept + 4 * (N * (first + i) + j))
        channel = h * N + j
        scale, shift = f32(weight + 4 * channel), f32(bias + 4 * channel)
        key_scale, key_rate, bonus = f32(k_k + 4 * channel), f32(k_a + 4 * channel), f32(r_k + 4 * channel)
        for t in range(i64(starts + 8 * b), i64(starts + 8 * b + 8)):
            at = 4 * (D * t + channel)
            value, square, weighed = f32(v + at), np.float32(0), np.float32(0)
            if v_first != 0:
                value += (f32(v_first + at) - value) * f32(v_gate + at)
            if tid < N:
                key, rate = f32(k + at), f32(a + at)
                kappa = key * key_scale
                key *= np.float32(1) + (rate - np.float32(1)) * key_rate
                rows[0, j], rows[1, j], rows[2, j] = f32(r + at), f32(w + at), key
                rows[3, j], rows[4, j] = kappa, kappa * rate
                square, weighed = kappa * kappa, rows[0, j] * key * bonus
            # 1 / ‖κ‖ is taken twice, for κ·S and for κ∘a.
            inverse = np.float32(1) / max(sqrt(block_sum(square, scratch)), np.float32(1e-12))
            extra = block_sum(weighed, scratch)
            total = np.float32(0)
            if active:
                for i in range(ROWS):
                    total += rows[3, first + i] * S[i]
            sums[tid] = total
            cuda.syncthreads()
            removed = _column(sums, N, P, j) * inverse * inverse
            cuda.syncthreads()
            total = np.float32(0)
            if active:
                for i in range(ROWS):
                    S[i] = rows[1, first + i] * S[i] - rows[4, first + i] * removed + rows[2, first + i] * value
                    total += rows[0, first + i] * S[i]
            sums[tid] = total
            cuda.syncthreads()
            out = _column(sums, N, P, j)
            mean = block_sum(out if tid < N else np.float32(0), scratch) / np.float32(N)
            off = out - mean
            spread = block_sum(off * off if tid < N else np.float32(0), scratch) / np.float32(N)
            if tid < N:
                out = off / sqrt(spread + eps) * scale + shift + extra * value
                out *= f32(g + at)
                put_f32(y + at, out)
            if levels != 0:
                block = t // TOKENS * (D // GROUP) + h * (N // GROUP)
                _put_head(sums, out, N, levels_at(levels, factors, block), t % TOKENS)
        if active:
            for i in range(ROWS):
                put_f32(kept + 4 * (N * (first + i) + j), S[i])

    return wkv7
