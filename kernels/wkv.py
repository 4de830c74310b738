"""The recurrences. Each reads T tokens of [T, D] inputs, advances `state` in place and writes y [T, D].

Heads (channels in v4) are independent and run in parallel; time runs inside. Everything is float32, as the state and
its decay must be (RWKV-LM README).
"""

import numpy as np
from numba import prange

from rwkv_cli.kernels.jit import FIXED_ORDER, kernel


@kernel(parallel=True)
def wkv4(k, v, w, u, state, y):  # type: ignore[no-untyped-def]
    """RWKV-4 (arXiv 2305.13048, appendix on numerical stability): w = −exp(time_decay) and u [D], state [3, D].

    The state is numerator and denominator, both scaled by e^{−p}, and the running maximum p.
    """
    T, D = k.shape
    width = 32
    for block in prange((D + width - 1) // width):
        for d in range(block * width, min((block + 1) * width, D)):
            a, b, p = state[0, d], state[1, d], state[2, d]
            for t in range(T):
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
            state[0, d], state[1, d], state[2, d] = a, b, p


@kernel(parallel=True)
def wkv6(r, k, v, w, u, state, y):  # type: ignore[no-untyped-def]
    """RWKV-5 and 6 (arXiv 2404.05892, section 4.1): state S [H, N, N] as [key, value], u [H, N], w [T, D] or [1, D].

    y = r·(S + diag(u)·kᵀv) · S ← diag(w)·S + kᵀv
    """
    T = r.shape[0]
    H, N = u.shape
    for h in prange(H):
        S = state[h]
        o = h * N
        for t in range(T):
            row = t if w.shape[0] > 1 else 0
            for j in range(N):
                y[t, o + j] = 0
            for i in range(N):
                ri, ki, wi, ui = r[t, o + i], k[t, o + i], w[row, o + i], u[h, i]
                for j in range(N):
                    kv = ki * v[t, o + j]
                    y[t, o + j] += ri * (ui * kv + S[i, j])
                    S[i, j] = wi * S[i, j] + kv


# a freshly compiled kernel and a cached one must give the same bits: left free, LLVM orders the update either way
@kernel(parallel=True, fastmath=FIXED_ORDER)
def wkv7(r, w, k, v, kappa, beta, state, y):  # type: ignore[no-untyped-def]
    """RWKV-7 (arXiv 2503.14456, section 4): state S [H, N, N] as [value, key].

    S ← S·(diag(w) − κᵀ·beta) + vᵀk · y = S·rᵀ
    """
    T = r.shape[0]
    H, N = state.shape[0], state.shape[1]
    for h in prange(H):
        S = state[h]
        o = h * N
        for t in range(T):
            for i in range(N):
                dot = np.float32(0)
                for j in range(N):
                    dot += S[i, j] * kappa[t, o + j]
                vi, out = v[t, o + i], np.float32(0)
                for j in range(N):
                    S[i, j] = S[i, j] * w[t, o + j] - dot * beta[t, o + j] + vi * k[t, o + j]
                for j in range(N):
                    out += S[i, j] * r[t, o + j]
                y[t, o + i] = out
