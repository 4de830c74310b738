"""The recurrences on the GPU: a block has a head of a sequence and goes through its tokens, the state in registers.

Rows are those of B sequences, `starts` int64 [B + 1]. State b is at the address found at `state`, `offset` bytes on.
A matrix S [N, N] is [key, value]: thread j of a part has its share of column j, so neighbours read neighbours.
"""

import functools

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import (
    Kernel,
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
)  # fmt: skip
from rwkv_cli.kernels.cuda.device.levels import put_levels

CHANNELS = 64
"""Threads of a block of `wkv4`."""


@kernel("iiiiiiiiii", CHANNELS)
def wkv4(r, k, v, w, u, starts, state, offset, y, D):  # type: ignore[no-untyped-def]
    """y = r ∘ RWKV-4's average (arXiv 2305.13048, appendix); w = −exp(time_decay), u [D]. Blocks: (D, B).

    State [3, D]: numerator and denominator, both scaled by e^{−p}, and the running maximum p.
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
    """How many threads share a column of N keys: a block has `parts` · N threads, rounded up to whole warps."""
    return 4 if N % 4 == 0 and N <= 256 else 1


def threads(N: int) -> int:
    """Of a block for heads of size N, which is 992 at most: with 32 more, a scratch of 1024."""
    return -(-N * parts(N) // 32) * 32


@function
def _column(sums, N, shares, j):  # type: ignore[no-untyped-def]
    """Σ over the parts of column j."""
    total = sums[j]
    for part in range(1, shares):
        total += sums[part * N + j]
    return total


@function
def _put_head(values, out, N, h, levels, factors, D, t):  # type: ignore[no-untyped-def]
    """Levels of head h's outputs for token t, `out` in the first N threads; N is a multiple of 32, `values` shared."""
    tid = np.int64(cuda.threadIdx.x)
    values[tid] = out
    cuda.syncthreads()
    if tid < N // 4:
        group = tid // 8
        block = t // 8 * (D // 32) + h * (N // 32) + group
        put_levels(values, 32 * group, tid % 8, levels, factors, block, t)


@functools.cache
def wkv6(N: int) -> Kernel:
    """The kernel for heads of size N."""
    P, B = parts(N), threads(N)
    ROWS, SCRATCH, SHARED = N // P, B + 32, (4, N)

    @kernel("iiiiiiiiifiiiiiii", B, name=f"wkv6 N={N}")
    def wkv6(r, k, v, w, w_stride, u, weight, bias, gate, eps, starts, state, offset, y, levels, factors, D):  # type: ignore[no-untyped-def]
        """RWKV-5 and 6 (arXiv 2404.05892, section 4.1). Blocks: (H, B).

        y = r·(S + diag(u)·kᵀv) · S ← diag(w)·S + kᵀv; y normed by head (weight, bias [D]), ∘ gate (0: none).
        Levels as in `cuda_levels` (0: none). w_stride is D, or 0 where one row serves all tokens.
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
                _put_head(sums, out, N, h, levels, factors, D, t)
        if active:
            for i in range(ROWS):
                put_f32(kept + 4 * (N * (first + i) + j), S[i])

    return wkv6


@functools.cache
def wkv7(N: int) -> Kernel:
    """The kernel for heads of size N."""
    P, B = parts(N), threads(N)
    ROWS, SCRATCH, SHARED = N // P, B + 32, (5, N)

    @kernel("iiiiiiiiiiiiifiiiiiii", B, name=f"wkv7 N={N}")
    def wkv7(  # type: ignore[no-untyped-def]
        r,
        w,
        k,
        v,
        a,
        g,
        v_first,
        v_gate,
        k_k,
        k_a,
        r_k,
        weight,
        bias,
        eps,
        starts,
        state,
        offset,
        y,
        levels,
        factors,
        D,
    ):
        """RWKV-7 (arXiv 2503.14456, section 4), `Recorder.wkv7` with S as [key, value]. Blocks: (H, B).

        S ← diag(w)·S − (κ∘a)ᵀ·(κ·S) + kᵀv · y = r·S. v_first 0: no value residual.
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
            # of ‖κ‖: the first factor belongs to κ·S, the second to κ∘a
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
                _put_head(sums, out, N, h, levels, factors, D, t)
        if active:
            for i in range(ROWS):
                put_f32(kept + 4 * (N * (first + i) + j), S[i])

    return wkv7
