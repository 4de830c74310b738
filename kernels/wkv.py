"""The recurrences. Each reads T tokens of [T, D] inputs, advances `state` in place and writes y [T, D].

The tokens are those of B sequences: starts[b] to starts[b + 1] are b's rows, state[b] is its state. Sequences and heads
(channels in v4) are independent and run in parallel; time runs inside. A thread gets neighbouring pieces, so these are
a head of every sequence in turn: one long sequence among short ones is everybody's work. Everything is float32, as the
state and its decay must be (RWKV-LM README).

Inner loops run over slices from 0. numba lets an index count from the end where it is negative, and where it cannot
tell that none is, as in y[t, o + j], LLVM leaves the loop scalar.
"""

import numpy as np
from numba import prange

from rwkv_cli.kernels.jit import FIXED_ORDER, kernel


@kernel(parallel=True)
def wkv4(k, v, w, u, starts, state, y):  # type: ignore[no-untyped-def]
    """RWKV-4 (arXiv 2305.13048, appendix on numerical stability): w = −exp(time_decay) and u [D], state [B, 3, D].

    The state is numerator and denominator, both scaled by e^{−p}, and the running maximum p.
    """
    B, _, D = state.shape
    width = 32
    for piece in prange((D + width - 1) // width * B):
        block, s = piece // B, piece % B
        for d in range(block * width, min((block + 1) * width, D)):
            a, b, p = state[s, 0, d], state[s, 1, d], state[s, 2, d]
            for t in range(starts[s], starts[s + 1]):
                here = u[d] + k[t, d]
                top = max(p, here)
                old, new = np.exp(p - top), np.exp(here - top)
                y[t, d] = (old * a + new * v[t, d]) / (old * b + new)
                here = p + w[d]
                top = max(here, k[t, d])
                old, new = np.exp(here - top), np.exp(k[t, d] - top)
                a = old * a + new * v[t, d]
                b = old * b + new
                p = top
            state[s, 0, d], state[s, 1, d], state[s, 2, d] = a, b, p


@kernel(parallel=True)
def wkv6(r, k, v, w, u, starts, state, y):  # type: ignore[no-untyped-def]
    """RWKV-5 and 6 (arXiv 2404.05892, section 4.1): S [B, H, N, N] as [key, value], u [H, N], w [T, D] or [1, D].

    y = r·(S + diag(u)·kᵀv) · S ← diag(w)·S + kᵀv
    """
    B = state.shape[0]
    H, N = u.shape
    for piece in prange(H * B):
        h, b = piece // B, piece % B
        S = state[b, h]
        o = h * N
        for t in range(starts[b], starts[b + 1]):
            row = t if w.shape[0] > 1 else 0
            yt, vt = y[t, o : o + N], v[t, o : o + N]
            for j in range(N):
                yt[j] = 0
            for i in range(N):
                Si = S[i]
                ri, ki, wi, ui = r[t, o + i], k[t, o + i], w[row, o + i], u[h, i]
                for j in range(N):
                    kv = ki * vt[j]
                    yt[j] += ri * (ui * kv + Si[j])
                    Si[j] = wi * Si[j] + kv


@kernel()
def _dot(a, b):  # type: ignore[no-untyped-def]
    """Σ a·b."""
    total = np.float32(0)
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


# a freshly compiled kernel and a cached one must give the same bits: left free, LLVM orders the update either way
@kernel(parallel=True, fastmath=FIXED_ORDER)
def wkv7(r, w, k, v, kappa, beta, starts, state, y):  # type: ignore[no-untyped-def]
    """RWKV-7 (arXiv 2503.14456, section 4): state S [B, H, N, N] as [value, key].

    S ← S·(diag(w) − κᵀ·beta) + vᵀk · y = S·rᵀ
    """
    B, H, N = state.shape[0], state.shape[1], state.shape[2]
    for piece in prange(H * B):
        h, b = piece // B, piece % B
        S = state[b, h]
        o = h * N
        for t in range(starts[b], starts[b + 1]):
            here = slice(o, o + N)
            rt, wt, kt, at, bt = r[t, here], w[t, here], k[t, here], kappa[t, here], beta[t, here]
            for i in range(N):
                Si, vi = S[i], v[t, o + i]
                dot = _dot(Si, at)
                for j in range(N):
                    Si[j] = Si[j] * wt[j] - dot * bt[j] + vi * kt[j]
                y[t, o + i] = _dot(Si, rt)
