"""Losses and divergences of logits [T, V]. Exponentials are summed in float32 by blocks, and the blocks in float64."""

from typing import NamedTuple

import numpy as np

from rwkv_cli.kernels.cpu.args import BOOL_2, F32_2, F64_2, I64_1, unpack
from rwkv_cli.kernels.cpu.compile import function, kernel
from rwkv_cli.kernels.cpu.elementwise import exp, span
from rwkv_cli.kernels.cpu.llvm.bits import bits_of, float_of

_BLOCK = 1024


@function()
def _top(x):
    """The largest of x, or NaN if there is one: as integers, whose maximum becomes vectors."""
    top = np.int32(-0x80000000)
    for i in range(len(x)):
        b = bits_of(x[i])
        top = max(top, b ^ ((b >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return float_of(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@function()
def _sum_exp(x, top):
    """Σ e^(x − top)."""
    total = 0.0
    for block in range(0, len(x), _BLOCK):
        piece = x[block : block + _BLOCK]
        part = np.float32(0)
        for i in range(len(piece)):
            part += exp(piece[i] - top)
        total += np.float64(part)
    return total


class CrossEntropyArgs(NamedTuple):
    """logits [T, V], targets [T], nll [T, 1]."""

    logits: F32_2
    targets: I64_1
    nll: F64_2


@kernel(CrossEntropyArgs)
def cross_entropy(args: int, part: int, parts: int) -> None:
    """nll[t] = log Σ_v exp(logits[t, v]) − logits[t, targets[t]]."""
    a = unpack(args, CrossEntropyArgs)
    logits = a.logits
    begin, end = span(part, parts, len(logits))
    for t in range(begin, end):
        top = _top(logits[t])
        a.nll[t, 0] = np.log(_sum_exp(logits[t], top)) + np.float64(top) - np.float64(logits[t, a.targets[t]])


class DivergenceArgs(NamedTuple):
    """p, q [T, V] logits; kl, same [T, 1]."""

    p: F32_2
    q: F32_2
    kl: F64_2
    same: BOOL_2


@kernel(DivergenceArgs)
def divergence(args: int, part: int, parts: int) -> None:
    """kl[t] = KL(softmax(p[t]) ‖ softmax(q[t])) in nats; same[t]: both have the same likeliest token."""
    a = unpack(args, DivergenceArgs)
    p, q = a.p, a.q
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
        a.kl[t, 0] = cross / total_p - np.log(total_p) + np.log(total_q)
        a.same[t, 0] = ip == iq
