"""float32 to int8 in groups of 32 columns with float16 scales, 8.5 bits a weight.

A group's scale is found by search: of CANDIDATES float16 numbers from absmax/128 upward, each the STEP-th after the one
before (together 4 to 7 % of the scale), the one with the least squared error wins. The rounding errors of 32 values
scatter by a sixth from scale to scale, so the best of them has a fifth less squared error than plain absmax/127 (Q8_0).
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from numpy.typing import NDArray

from rwkv_cli.kernels.cpu.args import unpack
from rwkv_cli.kernels.cpu.compile import kernel
from rwkv_cli.kernels.cpu.cores import usable_cores
from rwkv_cli.kernels.cpu.elementwise import span
from rwkv_cli.kernels.cpu.llvm.bits import bits_of, float_of
from rwkv_cli.kernels.cpu.team import Program

GROUP = 32
CANDIDATES, STEP = 24, 3
_LANES = 32
"""Of vectors: the candidates, and some that do not count."""


def _best_scale(typingctx, group, first, error):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """The first candidate c with the least Σ (x − q·s)², q = round(x / s) to int8, where s has the float16 bits
    first + c·STEP (at least 1), over the 32 float32 at `group`; that sum is left at `error`. All int64, addresses but
    `first`. A lane is a candidate, so no sum crosses lanes."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        floats, ints = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(ir.IntType(32), _LANES)
        i64, i32, f32 = ir.IntType(64), ir.IntType(32), ir.FloatType()

        def all_(value: Any, kind: Any) -> Any:
            one = b.insert_element(ir.Constant(kind, ir.Undefined), value, i32(0))
            return b.shuffle_vector(one, one, ir.Constant(ints, None))

        def call(name: str, *values: Any) -> Any:
            kind = ir.FunctionType(floats, [floats] * len(values))
            return b.call(get_or_insert_function(b.module, kind, f"llvm.{name}.v{_LANES}f32"), values)

        steps = ir.Constant(ints, [i32(STEP * c) for c in range(_LANES)])
        bits = b.add(all_(b.trunc(args[1], i32), ints), steps)
        bits = b.select(b.icmp_signed(">", bits, all_(i32(1), ints)), bits, all_(i32(1), ints))
        scale = b.fmul(b.bitcast(b.shl(bits, all_(i32(13), ints)), floats), all_(f32(2.0**112), floats))
        inverse = b.fdiv(all_(f32(1), floats), scale)
        low, high = all_(f32(-128), floats), all_(f32(127), floats)
        start, loop, end = b.block, b.append_basic_block(), b.append_basic_block()
        b.branch(loop)
        b.position_at_end(loop)
        i, total = b.phi(i64), b.phi(floats)
        x = all_(b.load(b.inttoptr(b.add(args[0], b.mul(i, i64(4))), f32.as_pointer())), floats)
        q = call("rint", b.fmul(x, inverse))
        q = b.select(b.fcmp_ordered(">", q, low), q, low)
        q = b.select(b.fcmp_ordered("<", q, high), q, high)
        d = b.fsub(x, b.fmul(q, scale, flags=("contract",)), flags=("contract",))
        new = b.fadd(total, b.fmul(d, d, flags=("contract",)), flags=("contract",))
        following = b.add(i, i64(1))
        for phi, before, value in ((i, i64(0), following), (total, ir.Constant(floats, None), new)):
            phi.add_incoming(before, start)
            phi.add_incoming(value, loop)
        b.cbranch(b.icmp_signed("<", following, i64(GROUP)), loop, end)
        b.position_at_end(end)
        mask = ir.Constant(ir.VectorType(ir.IntType(1), _LANES), [ir.IntType(1)(c < CANDIDATES) for c in range(_LANES)])
        new = b.select(mask, new, all_(f32(math.inf), floats))
        kind = ir.FunctionType(f32, [floats])
        least = b.call(get_or_insert_function(b.module, kind, f"llvm.vector.reduce.fmin.v{_LANES}f32"), [new])
        b.store(least, b.inttoptr(args[2], f32.as_pointer()))
        found = b.bitcast(b.fcmp_ordered("==", new, all_(least, floats)), i32)
        return b.zext(b.cttz(found, ir.IntType(1)(0)), i64)

    return types.int64(types.int64, types.int64, types.int64), generate


best_scale: Any = intrinsic(_best_scale)

QUANTIZE = "f32.2 f32 i8.2 u16.2 f64.1 int"


@kernel(QUANTIZE)
def _quantize(args, part):  # type: ignore[no-untyped-def]
    """Rows w [R, K], brought to the tensor's unit by a factor of `unit`, to values, scales and squared errors [R]."""
    w, unit, values, scales, errors, parts = unpack(args, QUANTIZE)
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
                group[:] = 0
                for i in range(len(row)):
                    group[i] = row[i] * unit
            top = np.int32(0)
            for i in range(GROUP):
                top = max(top, bits_of(group[i]) & np.int32(0x7FFFFFFF))
            out = values[n, g * GROUP : (g + 1) * GROUP]
            if top == 0:
                scales[n, g] = 0
                out[:] = 0
                continue
            # float16 bits of top/128, rounded down: the exponent is rebased from 127 to 15
            base = float_of(top) / np.float32(128)
            if base >= np.float32(2.0**-14):
                first = np.int64((bits_of(base) >> np.int32(13)) - np.int32(112 << 10))
            else:
                first = np.int64(base * np.float32(2.0**24))
            best = best_scale(group.ctypes.data, first, least.ctypes.data)
            bits = max(first + best * STEP, 1)
            inverse = np.float32(1) / (float_of(np.int32(bits << 13)) * np.float32(2.0**112))
            for i in range(GROUP):
                q = min(max(np.rint(group[i] * inverse), np.float32(-128)), np.float32(127))
                out[i] = np.int8(q)
            scales[n, g] = bits
            error += least[0]
        errors[n] = error / (np.float64(unit) * np.float64(unit))
    # these must live until here, and their addresses alone do not keep them
    group[0], least[0] = 0, 0


def quantize_rows(w: NDArray[np.float32], unit: int) -> tuple[NDArray[np.int8], NDArray[np.uint16], float]:
    """int8 values [R, K padded], float16 scale bits [R, K/32] and the squared error of the rows `w` [R, K]."""
    groups = -(-w.shape[1] // GROUP)
    values = np.empty((len(w), groups * GROUP), np.int8)
    scales = np.empty((len(w), groups), np.uint16)
    errors = np.zeros(len(w))
    threads = usable_cores().physical
    parts = min(len(w), 8 * threads)
    program = Program()
    program.add(_quantize, parts, np.ascontiguousarray(w), 2.0**-unit, values, scales, errors, parts)
    program.run(threads)
    return values, scales, float(errors.sum())
