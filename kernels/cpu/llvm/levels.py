"""LLVM code that brings numbers into the form that `group` multiplies: activations to integers, rows to tiles."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from rwkv_cli.kernels.cpu.llvm.emitter import F32, I8, I16, I32, I64, Emitter, vector


def _interleave(typingctx, w, stride, tile):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """The 16 bytes at `w` and at the next three rows, `stride` apart, to a tile of 16 × 4 at `tile`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        e, b = Emitter(builder), builder
        w, stride, tile = args
        rows = [e.load(vector(I8, 16), b.add(w, b.mul(stride, I64(i)))) for i in range(4)]
        join = ir.Constant(vector(I32, 32), [I32(i) for i in range(32)])
        halves = [b.shuffle_vector(*rows[:2], join), b.shuffle_vector(*rows[2:], join)]
        order = ir.Constant(vector(I32, 64), [I32(i // 4 + 16 * (i % 4)) for i in range(64)])
        e.store(b.shuffle_vector(*halves, order), tile)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


interleave: Any = intrinsic(_interleave)


def _prefetch(typingctx, address):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Ask for the cache line at `address` (int64) before it is needed. Any address is fine."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        place = builder.inttoptr(args[0], I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, I32, I32, I32])
        call = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(call, [place, I32(0), I32(2), I32(1)])  # to read, into the second cache, data
        return context.get_dummy_value()

    return types.void(types.int64), generate


prefetch: Any = intrinsic(_prefetch)


def quantize_step(vnni: bool, levels: int, lerp: bool) -> Callable[..., None]:
    """32 float32 activations to integers of at most ±`levels`, in the form that `group_step` takes.

    Arguments: addresses (int64) of x, of delta and mix (used if `lerp`, where the activations are x + delta · mix), of
    the integers, of factor and offset. factor = max|x| / levels; a NaN or infinity
    makes it NaN. offset = −128 times the sum of the integers.
    """

    @intrinsic
    def step(typingctx, x, delta, mix, out, factor, offset):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b = Emitter(builder), builder
            x, delta, mix, out, factor, offset = args
            ints, floats = vector(I32, 32), vector(F32, 32)

            def call(name: str, result: Any, *values: Any) -> Any:
                kind = ir.FunctionType(result, [value.type for value in values])
                return b.call(get_or_insert_function(b.module, kind, name), list(values))

            def all_(value: int) -> Any:
                return ir.Constant(ints, [I32(value)] * 32)

            value = e.load(floats, x)
            if lerp:
                part = b.fmul(e.load(floats, delta), e.load(floats, mix), flags=("contract",))
                value = b.fadd(value, part, flags=("contract",))
            # magnitudes order as their bits do, and what is not finite comes last
            bits = call("llvm.vector.reduce.umax.v32i32", I32, b.and_(b.bitcast(value, ints), all_(0x7FFFFFFF)))
            # what is not finite is left out of the integers, whose factor says so
            finite = b.icmp_unsigned("<", bits, I32(0x7F800000))
            keep = e.splat(b.sext(finite, I32), 32)
            value = b.bitcast(b.and_(b.bitcast(value, ints), keep), floats)
            top = b.bitcast(bits, F32)
            inverse = b.select(b.fcmp_ordered(">", top, F32(1e-30)), b.fdiv(F32(levels), top), F32(0))
            e.store(b.select(finite, b.fmul(top, F32(float(np.float32(1 / levels)))), F32(math.nan)), factor)
            scaled = call("llvm.rint.v32f32", floats, b.fmul(value, e.splat(inverse, 32)))
            q = b.fptosi(scaled, ints)
            total = call("llvm.vector.reduce.add.v32i32", I32, q)
            e.store(b.mul(total, I32(-128)), offset)
            if vnni:
                upper = b.ashr(b.add(q, all_(128)), all_(8))
                e.store(b.trunc(upper, vector(I8, 32)), out)
                e.store(b.trunc(q, vector(I8, 32)), b.add(out, I64(32)))
            else:
                e.store(b.trunc(q, vector(I16, 32)), out)
            return context.get_dummy_value()

        return types.void(*([types.int64] * 6)), generate

    return step
