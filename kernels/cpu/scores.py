"""What perplexity needs of logits [T, V]: losses and divergences. Exponentials are summed in float32 by blocks, and
these in float64."""

import numpy as np

from rwkv_cli.kernels.cpu.args import unpack
from rwkv_cli.kernels.cpu.compile import function, kernel
from rwkv_cli.kernels.cpu.elementwise import exp, span
from rwkv_cli.kernels.cpu.llvm.bits import bits_of, float_of

_BLOCK = 1024


@function()
def _top(x):  # type: ignore[no-untyped-def]
    """The largest of x, or NaN if there is one: as integers, whose maximum becomes vectors."""
    top = np.int32(-0x80000000)
    for i in range(len(x)):
        b = bits_of(x[i])
        top = max(top, b ^ ((b >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return float_of(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@function()
def _sum_exp(x, top):  # type: ignore[no-untyped-def]
    """Σ e^(x − top)."""
    total = 0.0
    for block in range(0, len(x), _BLOCK):
        piece = x[block : block + _BLOCK]
        part = np.float32(0)
        for i in range(len(piece)):
            part += exp(piece[i] - top)
        total += np.float64(part)
    return total


CROSS_ENTROPY = "f32.2 i64.1 f64.1 int"


@kernel(CROSS_ENTROPY)
def cross_entropy(args, part):  # type: ignore[no-untyped-def]
    """nll[t] = log Σ_v exp(logits[t, v]) − logits[t, targets[t]]."""
    logits, targets, nll, parts = unpack(args, CROSS_ENTROPY)
    begin, end = span(part, parts, len(logits))
    for t in range(begin, end):
        top = _top(logits[t])
        nll[t] = np.log(_sum_exp(logits[t], top)) + np.float64(top) - np.float64(logits[t, targets[t]])


DIVERGENCE = "f32.2 f32.2 f64.1 u8.1 int"


@kernel(DIVERGENCE)
def divergence(args, part):  # type: ignore[no-untyped-def]
    """kl[t] = KL(softmax(p[t]) ‖ softmax(q[t])) in nats, same[t] = whether both have the same likeliest token."""
    p, q, kl, same, parts = unpack(args, DIVERGENCE)
    begin, end = span(part, parts, len(p))
    for t in range(begin, end):
        ip, iq = 0, 0
        for i in range(p.shape[1]):
            if p[t, i] > p[t, ip]:
                ip = i
            if q[t, i] > q[t, iq]:
                iq = i
        top_p, top_q = np.float64(p[t, ip]), np.float64(q[t, iq])
        total_p, total_q, cross = 0.0, 0.0, 0.0
        for i in range(p.shape[1]):
            e = np.exp(p[t, i] - top_p)
            total_p += e
            total_q += np.exp(q[t, i] - top_q)
            cross += e * ((p[t, i] - top_p) - (q[t, i] - top_q))
        kl[t] = cross / total_p - np.log(total_p) + np.log(total_q)
        same[t] = ip == iq
