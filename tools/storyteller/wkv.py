"""WKV-7 for training: a torch autograd function over two numba kernels.

The recurrence of a head, with S [N, N] (value rows, key columns) and all else [N] for token t:

    S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ,    y_t = S_t r_t

(RWKV-7, arXiv 2503.14456, section 3; BlinkDL/RWKV-LM RWKV-v7/train_temp/cuda/wkv7_cuda.cu keeps the same checkpoints).
Forward keeps S once every `SPAN` tokens; backward replays a span from its checkpoint, then runs it in reverse.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange

SPAN = 32
_FASTMATH = {"contract", "reassoc", "nsz", "arcp", "afn"}


@njit(parallel=True, fastmath=_FASTMATH, cache=True)
def _forward(r, w, k, v, a, b, y, kept):  # type: ignore[no-untyped-def]  # pragma: no cover
    batch, length, heads, n = r.shape
    for unit in prange(batch * heads):
        i, h = unit // heads, unit % heads
        state = np.zeros((n, n), np.float32)  # [key, value]: every inner loop runs over values
        for t in range(length):
            if t % SPAN == 0:
                kept[i, h, t // SPAN] = state
            sa = np.zeros(n, np.float32)
            for j in range(n):
                aj = a[i, t, h, j]
                for p in range(n):
                    sa[p] += state[j, p] * aj
            out = np.zeros(n, np.float32)
            for j in range(n):
                wj, bj, kj, rj = w[i, t, h, j], b[i, t, h, j], k[i, t, h, j], r[i, t, h, j]
                for p in range(n):
                    s = state[j, p] * wj + sa[p] * bj + v[i, t, h, p] * kj
                    state[j, p] = s
                    out[p] += s * rj
            y[i, t, h] = out


@njit(parallel=True, fastmath=_FASTMATH, cache=True)
def _backward(r, w, k, v, a, b, kept, dy, dr, dw, dk, dv, da, db):  # type: ignore[no-untyped-def]  # pragma: no cover
    batch, length, heads, n = r.shape
    for unit in prange(batch * heads):
        i, h = unit // heads, unit % heads
        states = np.empty((SPAN + 1, n, n), np.float32)  # [token, value, key]
        sas = np.empty((SPAN, n), np.float32)
        ds = np.zeros((n, n), np.float32)  # [value, key]: the gradient of S_t
        for span in range((length - 1) // SPAN, -1, -1):
            first = span * SPAN
            last = min(first + SPAN, length)
            for p in range(n):
                for j in range(n):
                    states[0, p, j] = kept[i, h, span, j, p]
            for t in range(first, last):
                old, new = states[t - first], states[t - first + 1]
                for p in range(n):
                    sa = np.float32(0)
                    for j in range(n):
                        sa += old[p, j] * a[i, t, h, j]
                    sas[t - first, p] = sa
                    vp = v[i, t, h, p]
                    for j in range(n):
                        new[p, j] = old[p, j] * w[i, t, h, j] + sa * b[i, t, h, j] + vp * k[i, t, h, j]
            for t in range(last - 1, first - 1, -1):
                old, new = states[t - first], states[t - first + 1]
                gr, gw, gk = np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32)
                ga, gb = np.zeros(n, np.float32), np.zeros(n, np.float32)
                for p in range(n):
                    g, vp, sa = dy[i, t, h, p], v[i, t, h, p], sas[t - first, p]
                    gv, gsa = np.float32(0), np.float32(0)
                    for j in range(n):
                        d = ds[p, j] + g * r[i, t, h, j]
                        ds[p, j] = d
                        gv += d * k[i, t, h, j]
                        gsa += d * b[i, t, h, j]
                    for j in range(n):
                        d = ds[p, j]
                        gr[j] += new[p, j] * g
                        gw[j] += d * old[p, j]
                        gk[j] += d * vp
                        gb[j] += d * sa
                        ga[j] += gsa * old[p, j]
                        ds[p, j] = d * w[i, t, h, j] + gsa * a[i, t, h, j]
                    dv[i, t, h, p] = gv
                dr[i, t, h], dw[i, t, h], dk[i, t, h] = gr, gw, gk
                da[i, t, h], db[i, t, h] = ga, gb


class _WKV7(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        inputs = tuple(x.contiguous() for x in inputs)
        batch, length, heads, n = inputs[0].shape
        y = torch.empty_like(inputs[0])
        kept = torch.empty(batch, heads, -(-length // SPAN), n, n)
        _forward(*(x.detach().numpy() for x in inputs), y.numpy(), kept.numpy())
        ctx.save_for_backward(*inputs, kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        grads = tuple(torch.empty_like(saved[0]) for _ in range(6))
        _backward(*(x.detach().numpy() for x in saved), dy.contiguous().numpy(), *(g.numpy() for g in grads))
        return grads


def wkv7(
    r: torch.Tensor, w: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """The outputs of all tokens from a zero state; all float32 [batch, tokens, heads, N], `w` the decay itself."""
    return _WKV7.apply(r, w, k, v, a, b)  # type: ignore[no-any-return]
