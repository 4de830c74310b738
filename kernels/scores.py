"""What perplexity needs of logits [T, V]: losses and divergences, summed in float64."""

import numpy as np
from numba import prange

from rwkv_cli.kernels.jit import kernel


@kernel(parallel=True)
def cross_entropy(logits, targets, nll):  # type: ignore[no-untyped-def]
    """nll[t] = log Σ_v exp(logits[t, v]) − logits[t, targets[t]], sums in float64."""
    T, V = logits.shape
    for t in prange(T):
        top = logits[t, 0]
        for i in range(V):
            top = max(top, logits[t, i])
        total = 0.0
        for i in range(V):
            total += np.exp(logits[t, i] - top)
        nll[t] = np.log(total) + np.float64(top) - np.float64(logits[t, targets[t]])


@kernel(parallel=True)
def divergence(p, q, kl, same):  # type: ignore[no-untyped-def]
    """kl[t] = KL(softmax(p[t]) ‖ softmax(q[t])) in nats, same[t] = whether both have the same likeliest token."""
    T, V = p.shape
    for t in prange(T):
        ip, iq = 0, 0
        for i in range(V):
            if p[t, i] > p[t, ip]:
                ip = i
            if q[t, i] > q[t, iq]:
                iq = i
        top_p, top_q = np.float64(p[t, ip]), np.float64(q[t, iq])
        total_p, total_q, cross = 0.0, 0.0, 0.0
        for i in range(V):
            e = np.exp(p[t, i] - top_p)
            total_p += e
            total_q += np.exp(q[t, i] - top_q)
            cross += e * ((p[t, i] - top_p) - (q[t, i] - top_q))
        kl[t] = cross / total_p - np.log(total_p) + np.log(total_q)
        same[t] = ip == iq
