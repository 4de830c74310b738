"""The recurrences, with what comes between them and the next matrix. Each reads T tokens of [T, D] inputs, advances
`state` in place and writes y [T, D].

The tokens are those of B sequences: starts[b] to starts[b + 1] − 1 are b's rows, state[b] is its state. A part is a
head (or some channels in v4) of one sequence; time runs inside. Everything is float32, as the state and its decay must
be (RWKV-LM README). Matrix states are [key, value] (see `recurrence`).

`kept` [T, L, …], if there is one, begins with this layer's part: kept[t, 0] gets the state after row t, but for the
last row of a sequence.

Inner loops run over slices from 0. numba lets an index count from the end where it is negative. Where it cannot tell
that none is, as in y[t, o + j], LLVM leaves the loop scalar.
"""

from typing import NamedTuple

import numpy as np

from rwkv_cli.kernels.cpu.args import F32, F32_1, F32_2, F32_3, F32_4, F32_5, I64_1, Int, unpack
from rwkv_cli.kernels.cpu.compile import FIXED_ORDER, function, kernel
from rwkv_cli.kernels.cpu.elementwise import address_of, exp, normalize
from rwkv_cli.kernels.cpu.llvm.recurrence import DeltaStep, LinearStep, delta_step, linear_step

CHANNELS = 32
"""Channels of RWKV-4 in a part."""


@function()
def _copy(x, out):
    """out = x for matrices, row by row."""
    for i in range(len(x)):
        xi, oi = x[i], out[i]
        for j in range(len(xi)):
            oi[j] = xi[j]


class Wkv4Args(NamedTuple):
    """r, k, v, y [T, D]; decay −exp(time_decay) and bonus [D]; starts [B + 1]; state [B, 3, D]; kept [T, L, 3, D]."""

    r: F32_2
    k: F32_2
    v: F32_2
    decay: F32_1
    bonus: F32_1
    starts: I64_1
    state: F32_3
    kept: F32_4
    y: F32_2


@kernel(Wkv4Args, FIXED_ORDER)
def wkv4(args: int, part: int, parts: int) -> None:  # noqa: ARG001
    """RWKV-4 (arXiv 2305.13048, appendix on numerical stability). y is r times the average.

    The state is numerator and denominator, both scaled by e^{−p}, and the running maximum p.
    """
    args_ = unpack(args, Wkv4Args)
    state, starts = args_.state, args_.starts
    B, D = state.shape[0], state.shape[2]
    s, first = part % B, part // B * CHANNELS
    here = slice(first, min(first + CHANNELS, D))
    a, b, p, ws, us = state[s, 0, here], state[s, 1, here], state[s, 2, here], args_.decay[here], args_.bonus[here]
    for t in range(starts[s], starts[s + 1]):
        rt, kt, vt, yt = args_.r[t, here], args_.k[t, here], args_.v[t, here], args_.y[t, here]
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
        if len(args_.kept) and t + 1 < starts[s + 1]:
            _copy(state[s, :, here], args_.kept[t, 0, :, here])


_delta64, _delta8, _delta1 = delta_step(64), delta_step(8), delta_step(1)
_linear64, _linear8, _linear1 = linear_step(64), linear_step(8), linear_step(1)


@function()
def _columns_together(N):
    """How many columns of a head of size N a step takes at once: as many as there are kernels for, and as divide N."""
    return 64 if N % 64 == 0 else 8 if N % 8 == 0 else 1


@function()
def _delta(c):
    """One token of one head (DeltaStep)."""
    N = c.size
    width = _columns_together(N)
    for at in range(0, N * 4, width * 4):
        here = DeltaStep(c.state + at, c.decay, c.key, c.kappa, c.beta, c.receptance, c.value + at, c.out + at, N)
        if width == 64:
            _delta64(here)
        elif width == 8:
            _delta8(here)
        else:
            _delta1(here)


@function()
def _linear(c):
    """One token of one head (LinearStep)."""
    N = c.size
    width = _columns_together(N)
    for at in range(0, N * 4, width * 4):
        here = LinearStep(c.state + at, c.decay, c.key, c.bonus, c.receptance, c.value + at, c.out + at, N)
        if width == 64:
            _linear64(here)
        elif width == 8:
            _linear8(here)
        else:
            _linear1(here)


class Wkv6Args(NamedTuple):
    """r, k, v, y [T, D]; decay [T, D] or [1, D]; bonus [H, N]; weight, bias [D] and eps of the norm by head.

    gate [T, D] or none; starts [B + 1]; state [B, H, N, N]; kept [T, L, H, N, N].
    """

    r: F32_2
    k: F32_2
    v: F32_2
    decay: F32_2
    shared_decay: Int
    bonus: F32_2
    weight: F32_1
    bias: F32_1
    eps: F32
    gate: F32_2
    starts: I64_1
    state: F32_4
    kept: F32_5
    y: F32_2


@kernel(Wkv6Args, FIXED_ORDER)
def wkv6(args: int, part: int, parts: int) -> None:  # noqa: ARG001
    """RWKV-5 and 6 (arXiv 2404.05892, section 4.1), w the decay and u the bonus.

    y = r·(S + diag(u)·kᵀv), normed by head, ∘ gate if there is one · S ← diag(w)·S + kᵀv
    """
    a = unpack(args, Wkv6Args)
    B, N = a.state.shape[0], a.bonus.shape[1]
    h, b = part // B, part % B
    S, uh, here = a.state[b, h], a.bonus[h], slice(h * N, h * N + N)
    out, bonus = np.empty(N, np.float32), np.empty(N, np.float32)
    for t in range(a.starts[b], a.starts[b + 1]):
        kt, wt = a.k[t, here], a.decay[0 if a.shared_decay else t, here]
        for i in range(N):
            bonus[i] = uh[i] * kt[i]
        _linear(
            LinearStep(
                state=address_of(S),
                decay=address_of(wt),
                key=address_of(kt),
                bonus=address_of(bonus),
                receptance=address_of(a.r[t, here]),
                value=address_of(a.v[t, here]),
                out=address_of(out),
                size=N,
            )
        )
        if len(a.kept) and t + 1 < a.starts[b + 1]:
            _copy(S, a.kept[t, 0, h])
        yt = a.y[t, here]
        normalize(out, a.weight[here], a.bias[here], a.eps, yt)
        if len(a.gate):
            gt = a.gate[t, here]
            for j in range(N):
                yt[j] *= gt[j]


@function()
def _dot3(a, b, c):
    """Σ a·b·c."""
    total = np.float32(0)
    for j in range(len(a)):
        total += a[j] * b[j] * c[j]
    return total


@function()
def _length(x):
    """√Σx²."""
    total = np.float32(0)
    for j in range(len(x)):
        total += x[j] * x[j]
    return np.sqrt(total)


class Wkv7Args(NamedTuple):
    """r, decay, k, v, rate, gate, y [T, D]; first and mix [T, D] of the value residual, or none.

    key_scale, key_rate [D], bonus [H, N]; weight, bias [D] and eps of the norm by head; starts [B + 1];
    state [B, H, N, N]; kept [T, L, H, N, N].
    """

    r: F32_2
    decay: F32_2
    k: F32_2
    v: F32_2
    rate: F32_2
    gate: F32_2
    first: F32_2
    mix: F32_2
    key_scale: F32_1
    key_rate: F32_1
    bonus: F32_2
    weight: F32_1
    bias: F32_1
    eps: F32
    starts: I64_1
    state: F32_4
    kept: F32_5
    y: F32_2


@kernel(Wkv7Args, FIXED_ORDER)
def wkv7(args: int, part: int, parts: int) -> None:  # noqa: ARG001
    """RWKV-7 (arXiv 2503.14456, section 4; rwkv_v7_numpy.py); the formula is that of `program.Wkv7`."""
    a = unpack(args, Wkv7Args)
    B, N = a.state.shape[0], a.bonus.shape[1]
    h, b = part // B, part % B
    S, here = a.state[b, h], slice(h * N, h * N + N)
    bonus, key_scale, key_rate = a.bonus[h], a.key_scale[here], a.key_rate[here]
    room = np.empty((5, N), np.float32)
    value, kappa, beta, key, out = room[0], room[1], room[2], room[3], room[4]
    for t in range(a.starts[b], a.starts[b + 1]):
        rt, wt, kt, vt, at = a.r[t, here], a.decay[t, here], a.k[t, here], a.v[t, here], a.rate[t, here]
        if len(a.first):
            ft, mt = a.first[t, here], a.mix[t, here]
            for j in range(N):
                value[j] = vt[j] + (ft[j] - vt[j]) * mt[j]
        else:
            for j in range(N):
                value[j] = vt[j]
        for j in range(N):
            kappa[j] = kt[j] * key_scale[j]
        scale = np.float32(1) / max(_length(kappa), np.float32(1e-12))
        for j in range(N):
            kappa[j] *= scale
            beta[j] = kappa[j] * at[j]
        for j in range(N):
            key[j] = kt[j] * (np.float32(1) + (at[j] - np.float32(1)) * key_rate[j])
        _delta(
            DeltaStep(
                state=address_of(S),
                decay=address_of(wt),
                key=address_of(key),
                kappa=address_of(kappa),
                beta=address_of(beta),
                receptance=address_of(rt),
                value=address_of(value),
                out=address_of(out),
                size=N,
            )
        )
        if len(a.kept) and t + 1 < a.starts[b + 1]:
            _copy(S, a.kept[t, 0, h])
        yt, gt = a.y[t, here], a.gate[t, here]
        normalize(out, a.weight[here], a.bias[here], a.eps, yt)
        extra = _dot3(rt, key, bonus)
        for j in range(N):
            yt[j] = (yt[j] + extra * value[j]) * gt[j]
