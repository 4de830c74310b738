"""Norms, shifts, mixes and activations on float32 [T, D], a row a token. All write in place or into `out`.

A loop that sums never stores floats as well. LLVM would put a test for overlapping arrays before it and a second,
scalar loop behind that, and where arrays happen to lie would decide in which order the sum is taken.
"""

import numpy as np

from rwkv_cli.kernels.bits import bits_of, float_of
from rwkv_cli.kernels.jit import FIXED_ORDER, kernel


@kernel(fastmath=FIXED_ORDER)
def exp(x):  # type: ignore[no-untyped-def]
    """e^x to 2 units in the last place, in a form that loops over it become vectors (the library's does not).

    x = n ln 2 + r, |r| ≤ ln 2 / 2; e^r by a polynomial (Cephes, expf.c), 2^n by way of the exponent. 0 below the
    smallest normal number.
    """
    shifted = x * np.float32(1.44269504) + np.float32(12582912)  # 1.5 · 2^23: n is in the lowest bits
    n = shifted - np.float32(12582912)
    r = x - n * np.float32(0.693359375)
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1)
    y = float_of(bits_of(p) + (bits_of(shifted) << np.int32(23)))
    y = np.float32(0) if x < np.float32(-87.33) else y
    y = np.float32(np.inf) if x > np.float32(88.37) else y
    return x if x != x else y


@kernel()
def layer_norm(x, weight, bias, eps, out):  # type: ignore[no-untyped-def]
    """out[t] = (x[t] − mean) / √(var + eps) · weight + bias."""
    T, D = x.shape
    for t in range(T):
        total = np.float32(0)
        for d in range(D):
            total += x[t, d]
        mean = total / np.float32(D)
        square = np.float32(0)
        for d in range(D):
            square += (x[t, d] - mean) * (x[t, d] - mean)
        scale = np.float32(1) / np.sqrt(square / np.float32(D) + np.float32(eps))
        for d in range(D):
            out[t, d] = (x[t, d] - mean) * scale * weight[d] + bias[d]


@kernel()
def _squares(x):  # type: ignore[no-untyped-def]
    """Σ x²."""
    total = np.float32(0)
    for d in range(len(x)):
        total += x[d] * x[d]
    return total


@kernel()
def _mean(x):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for d in range(len(x)):
        total += x[d]
    return total / np.float32(len(x))


@kernel()
def group_norm(x, weight, bias, heads, eps):  # type: ignore[no-untyped-def]
    """Layer norm of each of `heads` equal parts of a row, in place; weight and bias [D]."""
    T, D = x.shape
    N = D // heads
    for t in range(T):
        for h in range(heads):
            part, w, b = x[t, h * N : (h + 1) * N], weight[h * N : (h + 1) * N], bias[h * N : (h + 1) * N]
            mean = _mean(part)
            for d in range(N):
                part[d] -= mean
            scale = np.float32(1) / np.sqrt(_squares(part) / np.float32(N) + np.float32(eps))
            for d in range(N):
                part[d] = part[d] * scale * w[d] + b[d]


@kernel()
def shift(x, starts, last, delta):  # type: ignore[no-untyped-def]
    """Token shift: delta[t] = x[t−1] − x[t]. Before sequence b's first row is last[b], which then becomes its last row.

    starts [B + 1], last [B, D].
    """
    B, D = last.shape
    for b in range(B):
        first, end = starts[b], starts[b + 1]
        for d in range(D):
            delta[first, d] = last[b, d] - x[first, d]
        for t in range(first + 1, end):
            for d in range(D):
                delta[t, d] = x[t - 1, d] - x[t, d]
        for d in range(D):
            last[b, d] = x[end - 1, d]


@kernel()
def lerp(x, delta, mix, out):  # type: ignore[no-untyped-def]
    """out = x + delta · mix; mix is [1, D] or [T, D]."""
    T, D = x.shape
    for t in range(T):
        row = t if mix.shape[0] > 1 else 0
        for d in range(D):
            out[t, d] = x[t, d] + delta[t, d] * mix[row, d]


@kernel()
def add(x, y):  # type: ignore[no-untyped-def]
    """x += y; y is [T, D] or [1, D]."""
    T, D = x.shape
    for t in range(T):
        row = t if y.shape[0] > 1 else 0
        for d in range(D):
            x[t, d] += y[row, d]


@kernel()
def multiply(x, y):  # type: ignore[no-untyped-def]
    """x *= y."""
    T, D = x.shape
    for t in range(T):
        for d in range(D):
            x[t, d] *= y[t, d]


@kernel()
def sigmoid(x):  # type: ignore[no-untyped-def]
    T, D = x.shape
    for t in range(T):
        for d in range(D):
            x[t, d] = np.float32(1) / (np.float32(1) + exp(-x[t, d]))


@kernel()
def silu(x):  # type: ignore[no-untyped-def]
    T, D = x.shape
    for t in range(T):
        for d in range(D):
            x[t, d] /= np.float32(1) + exp(-x[t, d])


@kernel()
def tanh(x):  # type: ignore[no-untyped-def]
    T, D = x.shape
    for t in range(T):
        for d in range(D):
            x[t, d] = np.tanh(x[t, d])


@kernel()
def relu_squared(x):  # type: ignore[no-untyped-def]
    T, D = x.shape
    for t in range(T):
        for d in range(D):
            # written so that NaN stays NaN
            x[t, d] = np.float32(0) if x[t, d] <= 0 else x[t, d] * x[t, d]


@kernel()
def decay(x):  # type: ignore[no-untyped-def]
    """x = exp(−exp(x)), the decay of v5 and v6 from its logarithm's logarithm."""
    T, D = x.shape
    for t in range(T):
        for d in range(D):
            x[t, d] = exp(-exp(x[t, d]))


@kernel()
def delta_terms(k, w, a, k_k, k_a, heads, kappa, beta):  # type: ignore[no-untyped-def]
    """RWKV-7's terms of the delta rule from k, w and a before their sigmoids (rwkv_v7_numpy.py), all [T, D].

    w ← exp(−e^{−1/2} σ(w)) · a = σ(a) · κ = k∘k_k / ‖k∘k_k‖ by head · beta ← κ∘a · k ← k∘(1 + (a − 1)∘k_a)
    """
    T, D = k.shape
    N = D // heads
    for t in range(T):
        # few arrays a loop: with more, LLVM gives up telling them apart and stays scalar
        wt, at, kt, kappat, betat = w[t], a[t], k[t], kappa[t], beta[t]
        for d in range(D):
            wt[d] = exp(np.float32(-0.606530659712633) / (np.float32(1) + exp(-wt[d])))
        for d in range(D):
            betat[d] = np.float32(1) / (np.float32(1) + exp(-at[d]))
        for d in range(D):
            kappat[d] = kt[d] * k_k[d]
        for h in range(heads):
            part = kappat[h * N : (h + 1) * N]
            norm = np.float32(1) / max(np.sqrt(_squares(part)), np.float32(1e-12))
            for d in range(N):
                part[d] *= norm
        for d in range(D):
            kt[d] *= np.float32(1) + (betat[d] - np.float32(1)) * k_a[d]
        for d in range(D):
            betat[d] *= kappat[d]


@kernel()
def blend(v, first, gate):  # type: ignore[no-untyped-def]
    """RWKV-7's value residual: v += (first − v) · σ(gate), all [T, D]."""
    T, D = v.shape
    for t in range(T):
        for d in range(D):
            v[t, d] += (first[t, d] - v[t, d]) / (np.float32(1) + exp(-gate[t, d]))


@kernel()
def bonus(y, r, k, v, r_k):  # type: ignore[no-untyped-def]
    """RWKV-7's bonus: y += (Σ_head r∘k∘r_k) · v, all [T, D], r_k [H, N]."""
    T = y.shape[0]
    H, N = r_k.shape
    for t in range(T):
        for h in range(H):
            total = np.float32(0)
            for i in range(N):
                total += r[t, h * N + i] * k[t, h * N + i] * r_k[h, i]
            for i in range(N):
                y[t, h * N + i] += total * v[t, h * N + i]
