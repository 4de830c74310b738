"""The recurrences, with what comes between them and the next matrix. Each reads T tokens of [T, D] inputs, advances
`state` in place and writes y [T, D].

The tokens are those of B sequences: starts[b] to starts[b + 1] are b's rows, state[b] is its state. A part is a head
(or some channels in v4) of one sequence; time runs inside. Everything is float32, as the state and its decay must be
(RWKV-LM README). Matrix states are [key, value] (see `recurrence`).

Inner loops run over slices from 0. numba lets an index count from the end where it is negative, and where it cannot
tell that none is, as in y[t, o + j], LLVM leaves the loop scalar.
"""

import numpy as np

from rwkv_cli.kernels.cpu.args import unpack
from rwkv_cli.kernels.cpu.compile import FIXED_ORDER, function, kernel
from rwkv_cli.kernels.cpu.elementwise import exp, normalize
from rwkv_cli.kernels.cpu.llvm.recurrence import delta_step, linear_step

CHANNELS = 32
"""Of RWKV-4, in a part."""

WKV4 = "f32.2 f32.2 f32.2 f32.1 f32.1 i64.1 f32.3 f32.2"


@kernel(WKV4, FIXED_ORDER)
def wkv4(args, part):  # type: ignore[no-untyped-def]
    """RWKV-4 (arXiv 2305.13048, appendix on numerical stability): w = −exp(time_decay) and u [D], state [B, 3, D].

    The state is numerator and denominator, both scaled by e^{−p}, and the running maximum p. y is r times the average.
    """
    r, k, v, w, u, starts, state, y = unpack(args, WKV4)
    B, D = state.shape[0], state.shape[2]
    s, first = part % B, part // B * CHANNELS
    here = slice(first, min(first + CHANNELS, D))
    a, b, p, ws, us = state[s, 0, here], state[s, 1, here], state[s, 2, here], w[here], u[here]
    for t in range(starts[s], starts[s + 1]):
        rt, kt, vt, yt = r[t, here], k[t, here], v[t, here], y[t, here]
        for d in range(len(kt)):
            now = us[d] + kt[d]
            top = max(p[d], now)
            old, new = exp(p[d] - top), exp(now - top)
            yt[d] = rt[d] * ((old * a[d] + new * vt[d]) / (old * b[d] + new))
        for d in range(len(kt)):
            now = p[d] + ws[d]
            top = max(now, kt[d])
            old, new = exp(now - top), exp(kt[d] - top)
            a[d] = old * a[d] + new * vt[d]
            b[d] = old * b[d] + new
            p[d] = top


_delta64, _delta8, _delta1 = delta_step(64), delta_step(8), delta_step(1)
_linear64, _linear8, _linear1 = linear_step(64), linear_step(8), linear_step(1)


@function()
def _delta(S, w, k, kappa, beta, r, v, out, N):  # type: ignore[no-untyped-def]
    """A token of one head: as many columns at once as divide N."""
    width = 64 if N % 64 == 0 else 8 if N % 8 == 0 else 1
    for at in range(0, N * 4, width * 4):
        if width == 64:
            _delta64(S + at, w, k, kappa, beta, r, v + at, out + at, N)
        elif width == 8:
            _delta8(S + at, w, k, kappa, beta, r, v + at, out + at, N)
        else:
            _delta1(S + at, w, k, kappa, beta, r, v + at, out + at, N)


@function()
def _linear(S, w, k, bonus, r, v, out, N):  # type: ignore[no-untyped-def]
    """A token of one head: as many columns at once as divide N."""
    width = 64 if N % 64 == 0 else 8 if N % 8 == 0 else 1
    for at in range(0, N * 4, width * 4):
        if width == 64:
            _linear64(S + at, w, k, bonus, r, v + at, out + at, N)
        elif width == 8:
            _linear8(S + at, w, k, bonus, r, v + at, out + at, N)
        else:
            _linear1(S + at, w, k, bonus, r, v + at, out + at, N)


WKV6 = "f32.2 f32.2 f32.2 f32.2 f32.2 f32.1 f32.1 f32 f32.2 i64.1 f32.4 f32.2"


@kernel(WKV6, FIXED_ORDER)
def wkv6(args, part):  # type: ignore[no-untyped-def]
    """RWKV-5 and 6 (arXiv 2404.05892, section 4.1): S [B, H, N, N] as [key, value], u [H, N], w [T, D] or [1, D].

    y = r·(S + diag(u)·kᵀv), normed by head, ∘ gate if there is one · S ← diag(w)·S + kᵀv
    """
    r, k, v, w, u, weight, bias, eps, gate, starts, state, y = unpack(args, WKV6)
    B, N = state.shape[0], u.shape[1]
    h, b = part // B, part % B
    S, uh, here = state[b, h], u[h], slice(h * N, h * N + N)
    out, bonus = np.empty(N, np.float32), np.empty(N, np.float32)
    for t in range(starts[b], starts[b + 1]):
        kt, wt = k[t, here], w[t if len(w) > 1 else 0, here]
        for i in range(N):
            bonus[i] = uh[i] * kt[i]
        _linear(
            S.ctypes.data, wt.ctypes.data, kt.ctypes.data, bonus.ctypes.data, r[t, here].ctypes.data,
            v[t, here].ctypes.data, out.ctypes.data, N,
        )  # fmt: skip
        yt = y[t, here]
        normalize(out, weight[here], bias[here], eps, yt)
        if len(gate):
            gt = gate[t, here]
            for j in range(N):
                yt[j] *= gt[j]


@function()
def _dot3(a, b, c):  # type: ignore[no-untyped-def]
    """Σ a·b·c."""
    total = np.float32(0)
    for j in range(len(a)):
        total += a[j] * b[j] * c[j]
    return total


@function()
def _norm(x):  # type: ignore[no-untyped-def]
    """√Σx²."""
    total = np.float32(0)
    for j in range(len(x)):
        total += x[j] * x[j]
    return np.sqrt(total)


WKV7 = "f32.2 f32.2 f32.2 f32.2 f32.2 f32.2 f32.2 f32.2 f32.1 f32.1 f32.2 f32.1 f32.1 f32 i64.1 f32.4 f32.2"


@kernel(WKV7, FIXED_ORDER)
def wkv7(args, part):  # type: ignore[no-untyped-def]
    """RWKV-7 (arXiv 2503.14456, section 4; rwkv_v7_numpy.py): S [B, H, N, N] as [key, value], for the rest see
    `backend.Recorder.wkv7`. first and mix of the value residual may be missing."""
    r, w, k, v, a, g, first, mix, k_k, k_a, r_k, weight, bias, eps, starts, state, y = unpack(args, WKV7)
    B, N = state.shape[0], r_k.shape[1]
    h, b = part // B, part % B
    S, here = state[b, h], slice(h * N, h * N + N)
    bonus, key_scale, key_rate = r_k[h], k_k[here], k_a[here]
    value, kappa, beta, key = (np.empty(N, np.float32), np.empty(N, np.float32), np.empty(N, np.float32),
                               np.empty(N, np.float32))  # fmt: skip
    out = np.empty(N, np.float32)
    for t in range(starts[b], starts[b + 1]):
        rt, wt, kt, vt, at = r[t, here], w[t, here], k[t, here], v[t, here], a[t, here]
        if len(first):
            ft, mt = first[t, here], mix[t, here]
            for j in range(N):
                value[j] = vt[j] + (ft[j] - vt[j]) * mt[j]
        else:
            for j in range(N):
                value[j] = vt[j]
        for j in range(N):
            kappa[j] = kt[j] * key_scale[j]
        scale = np.float32(1) / max(_norm(kappa), np.float32(1e-12))
        for j in range(N):
            kappa[j] *= scale
            beta[j] = kappa[j] * at[j]
        for j in range(N):
            key[j] = kt[j] * (np.float32(1) + (at[j] - np.float32(1)) * key_rate[j])
        _delta(
            S.ctypes.data, wt.ctypes.data, key.ctypes.data, kappa.ctypes.data, beta.ctypes.data, rt.ctypes.data,
            value.ctypes.data, out.ctypes.data, N,
        )  # fmt: skip
        yt, gt = y[t, here], g[t, here]
        normalize(out, weight[here], bias[here], eps, yt)
        extra = _dot3(rt, key, bonus)
        for j in range(N):
            yt[j] = (yt[j] + extra * value[j]) * gt[j]
