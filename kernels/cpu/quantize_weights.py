"""float32 to int8 in groups of 32 columns with float16 scales, 8.5 bits a weight.

A group's scale is found by search. CANDIDATES float16 numbers are tried from absmax/128 upward, each the STEP-th after
the one before (together 4 to 7 % of the scale), and the one with the least squared error wins. The rounding errors of
32 values scatter by a sixth from scale to scale, so the best of them has a fifth less squared error than plain
absmax/127 (Q8_0).
"""

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import Loadable
from rwkv_cli.kernels.cpu.args import F32, F32_2, F64_1, I8_2, U16_2, unpack
from rwkv_cli.kernels.cpu.compile import kernel
from rwkv_cli.kernels.cpu.cores import usable_cores
from rwkv_cli.kernels.cpu.elementwise import address_of, span
from rwkv_cli.kernels.cpu.llvm.bits import bits_of, float_of
from rwkv_cli.kernels.cpu.llvm.emitter import F32 as FLOAT
from rwkv_cli.kernels.cpu.llvm.emitter import I1, I32, I64, Emitter, vector
from rwkv_cli.kernels.cpu.steps import Share, Steps
from rwkv_cli.kernels.cpu.team import TEAM
from rwkv_cli.numbers import GROUP

CANDIDATES, STEP = 24, 3
_LANES = 32
"""Lanes of vectors: the candidates, and some that do not count."""


def _best_scale(typingctx, group, first, error):  # noqa: ARG001
    """Find the first candidate c with the least Σ (x − q·s)², where q = round(x / s) to int8.

    s has the float16 bits first + c·STEP (at least 1), and the sum is over the 32 float32 at address `group`. The least
    sum is left at address `error`. A lane is a candidate, so no sum crosses lanes.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        e, b, floats, ints = Emitter(builder), builder, vector(FLOAT, _LANES), vector(I32, _LANES)
        group, first, error = args

        def all_(value: float) -> Any:
            return e.constant(FLOAT(value), _LANES)

        one = e.constant(I32(1), _LANES)
        steps = ir.Constant(ints, [I32(STEP * c) for c in range(_LANES)])
        bits = b.add(e.splat(b.trunc(first, I32), _LANES), steps)
        bits = b.select(b.icmp_signed(">", bits, one), bits, one)
        scale = b.fmul(b.bitcast(b.shl(bits, e.constant(I32(13), _LANES)), floats), all_(2.0**112))
        inverse = b.fdiv(all_(1), scale)

        def add_error(i: Any, carried: list[Any]) -> list[Any]:
            x = e.splat(e.load(FLOAT, b.add(group, b.mul(i, I64(4))), align=4), _LANES)
            q = e.call(f"llvm.rint.v{_LANES}f32", floats, b.fmul(x, inverse))
            q = b.select(b.fcmp_ordered(">", q, all_(-128)), q, all_(-128))
            q = b.select(b.fcmp_ordered("<", q, all_(127)), q, all_(127))
            d = b.fsub(x, b.fmul(q, scale, flags=("contract",)), flags=("contract",))
            return [b.fadd(carried[0], b.fmul(d, d, flags=("contract",)), flags=("contract",))]

        (total,) = e.loop(I64(0), I64(GROUP), 1, [ir.Constant(floats, None)], add_error)
        counts = ir.Constant(vector(I1, _LANES), [I1(c < CANDIDATES) for c in range(_LANES)])
        total = b.select(counts, total, all_(math.inf))
        least = e.call(f"llvm.vector.reduce.fmin.v{_LANES}f32", FLOAT, total)
        e.store(least, error, align=4)
        found = b.bitcast(b.fcmp_ordered("==", total, e.splat(least, _LANES)), I32)
        return b.zext(b.cttz(found, I1(0)), I64)

    return types.int64(types.int64, types.int64, types.int64), generate


best_scale: Any = intrinsic(_best_scale)


class QuantizeRowsArgs(NamedTuple):
    """w [R, K]; `by`, the factor that brings w to the tensor's unit; values [R, K padded], scales [R, K/32];
    squared errors [R]."""

    w: F32_2
    by: F32
    values: I8_2
    scales: U16_2
    errors: F64_1


@kernel(QuantizeRowsArgs)
def _quantize(args: int, part: int, parts: int) -> None:
    """Round each row of w · by to values and scales."""
    a = unpack(args, QuantizeRowsArgs)
    w, unit, values, scales = a.w, a.by, a.values, a.scales
    K = w.shape[1]
    group, least = np.empty(GROUP, np.float32), np.empty(1, np.float32)
    begin, end = span(part, parts, len(w))
    # first and bits are float16 bits
    for n in range(begin, end):
        error = np.float64(0)
        for g in range(scales.shape[1]):
            row = w[n, g * GROUP : min((g + 1) * GROUP, K)]
            if len(row) == GROUP:
                for i in range(GROUP):
                    group[i] = row[i] * unit
            else:
                for i in range(len(row), GROUP):
                    group[i] = 0
                for i in range(len(row)):
                    group[i] = row[i] * unit
            top = np.int32(0)
            for i in range(GROUP):
                top = max(top, bits_of(group[i]) & np.int32(0x7FFFFFFF))
            out = values[n, g * GROUP : (g + 1) * GROUP]
            if top == 0:
                scales[n, g] = 0
                for i in range(GROUP):
                    out[i] = 0
                continue
            # float16 bits of top/128, rounded down: the exponent is rebased from 127 to 15
            base = float_of(top) / np.float32(128)
            if base >= np.float32(2.0**-14):
                first = np.int64((bits_of(base) >> np.int32(13)) - np.int32(112 << 10))
            else:
                first = np.int64(base * np.float32(2.0**24))
            best = best_scale(address_of(group), first, address_of(least))
            bits = max(first + best * STEP, 1)
            inverse = np.float32(1) / (float_of(np.int32(bits << 13)) * np.float32(2.0**112))
            for i in range(GROUP):
                q = min(max(np.rint(group[i] * inverse), np.float32(-128)), np.float32(127))
                out[i] = np.int8(q)
            scales[n, g] = bits
            error += least[0]
        a.errors[n] = error / (np.float64(unit) * np.float64(unit))
    # these must live until here, and their addresses alone do not keep them
    group[0], least[0] = 0, 0


KERNELS: list[Loadable] = [TEAM, _quantize]
"""The kernels of `quantize_rows`."""


def quantize_rows(w: NDArray[np.float32], unit: int) -> tuple[NDArray[np.int8], NDArray[np.uint16], float]:
    """int8 values [R, K padded], float16 scale bits [R, K/32] and the squared error of the rows `w` [R, K]."""
    groups = -(-w.shape[1] // GROUP)
    values = np.empty((len(w), groups * GROUP), np.int8)
    scales = np.empty((len(w), groups), np.uint16)
    errors = np.zeros(len(w))
    threads = usable_cores().physical
    steps = Steps()
    record = QuantizeRowsArgs(np.ascontiguousarray(w), 2.0**-unit, values, scales, errors)
    steps.add(_quantize, record, Share.fixed(min(len(w), 8 * threads)))
    steps.finish().run(threads)
    return values, scales, float(errors.sum())
