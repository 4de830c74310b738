"""Gates, and the small products by row that make one. float32 [T, D], a row a token."""

from typing import NamedTuple

import numpy as np

from rwkv_cli.kernels.cpu.args import F32_2, unpack
from rwkv_cli.kernels.cpu.compile import FIXED_ORDER, kernel
from rwkv_cli.kernels.cpu.elementwise import span


class AddGatedArgs(NamedTuple):
    """x, y, gate [T, D]."""

    x: F32_2
    y: F32_2
    gate: F32_2


@kernel(AddGatedArgs)
def add_gated(args: int, part: int, parts: int) -> None:
    """x += y · gate."""
    a = unpack(args, AddGatedArgs)
    begin, end = span(part, parts, len(a.x))
    for t in range(begin, end):
        xt, yt, gt = a.x[t], a.y[t], a.gate[t]
        for d in range(len(xt)):
            xt[d] += yt[d] * gt[d]


class GateArgs(NamedTuple):
    """x, gate [T, D]."""

    x: F32_2
    gate: F32_2


@kernel(GateArgs)
def gate(args: int, part: int, parts: int) -> None:
    """x = x · gate."""
    a = unpack(args, GateArgs)
    begin, end = span(part, parts, len(a.x))
    for t in range(begin, end):
        xt, gt = a.x[t], a.gate[t]
        for d in range(len(xt)):
            xt[d] *= gt[d]


class RowProductsArgs(NamedTuple):
    """x [T, K], matrices [T, K · N], out [T, N]."""

    x: F32_2
    matrices: F32_2
    out: F32_2


@kernel(RowProductsArgs, FIXED_ORDER)
def row_products(args: int, part: int, parts: int) -> None:
    """out[t] = x[t] · M[t], where M[t] [K, N] is row t of matrices."""
    a = unpack(args, RowProductsArgs)
    begin, end = span(part, parts, len(a.x))
    for t in range(begin, end):
        xt, ot = a.x[t], a.out[t]
        for n in range(len(ot)):
            ot[n] = np.float32(0)
        for k in range(len(xt)):
            row = a.matrices[t, k * len(ot) : (k + 1) * len(ot)]
            for n in range(len(ot)):
                ot[n] += xt[k] * row[n]
