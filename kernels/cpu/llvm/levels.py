"""Steps that bring numbers into the form that `int8_dot` multiplies: activations to integers, rows to tiles."""

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from rwkv_cli.kernels.cpu.llvm.emitter import F32, I8, I16, I32, I64, Emitter, vector
from rwkv_cli.kernels.cpu.llvm.int8_dot import PLANES
from rwkv_cli.numbers import MOST_LEVEL

CACHE_LINE = 64
"""Bytes."""
IN_FOUR = (0, 2, 1, 3)
"""The order of each four levels without VNNI (`Emitter.even_and_odd`)."""


def _interleave(typingctx, w, stride, tile):  # noqa: ARG001
    """The 16 bytes at `w` and at the next three rows, `stride` apart, to a tile of 16 × 4 at `tile`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        e, b = Emitter(builder), builder
        w, stride, tile = args
        rows = [e.load(vector(I8, 16), b.add(w, b.mul(stride, I64(i)))) for i in range(4)]
        e.store(e.interleaved(rows), tile)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


interleave: Any = intrinsic(_interleave)


def _prefetch(typingctx, address):  # noqa: ARG001
    """Ask for the cache line at `address` (int64) before it is needed. Any address is fine."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        place = builder.inttoptr(args[0], I8.as_pointer())
        reading, second_cache, data = I32(0), I32(2), I32(1)
        Emitter(builder).call("llvm.prefetch.p0", ir.VoidType(), place, reading, second_cache, data)
        return context.get_dummy_value()

    return types.void(types.int64), generate


prefetch: Any = intrinsic(_prefetch)


class ActivationGroup(NamedTuple):
    """Addresses (int64) of 32 float32 activations, and of what becomes of them."""

    x: int
    delta: int
    """Read, as mix is, if the activations are x + delta · mix."""
    mix: int
    levels: int
    """int8 [planes, 32] for VNNI, else int16 [32] in the order of `IN_FOUR`."""
    factor: int
    """float32: max|x| / most level, or NaN if an activation is not finite."""
    offset: int
    """int32: −128 times the sum of the levels."""


def quantize_step(vnni: bool, bits: int, lerp: bool) -> Any:
    """The step that rounds an ActivationGroup to integers of some bits, as `groups_step` takes them."""
    planes = PLANES[bits]
    most = MOST_LEVEL if planes == 2 else 127

    @intrinsic
    def step(typingctx, group):  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b, ints, floats = Emitter(builder), builder, vector(I32, 32), vector(F32, 32)
            at = e.record(ActivationGroup, args[0])
            value = e.load(floats, at.x)
            if lerp:
                part = b.fmul(e.load(floats, at.delta), e.load(floats, at.mix), flags=("contract",))
                value = b.fadd(value, part, flags=("contract",))
            # magnitudes order as their bits do, and what is not finite comes last
            magnitudes = b.and_(b.bitcast(value, ints), e.constant(I32(0x7FFFFFFF), 32))
            bits = e.call("llvm.vector.reduce.umax.v32i32", I32, magnitudes)
            # what is not finite is left out of the integers, whose factor says so
            finite = b.icmp_unsigned("<", bits, I32(0x7F800000))
            keep = e.splat(b.sext(finite, I32), 32)
            value = b.bitcast(b.and_(b.bitcast(value, ints), keep), floats)
            top = b.bitcast(bits, F32)
            inverse = b.select(b.fcmp_ordered(">", top, F32(1e-30)), b.fdiv(F32(most), top), F32(0))
            e.store(b.select(finite, b.fmul(top, F32(float(np.float32(1 / most)))), F32(math.nan)), at.factor)
            scaled = e.call("llvm.rint.v32f32", floats, b.fmul(value, e.splat(inverse, 32)))
            q = b.fptosi(scaled, ints)
            e.store(b.mul(e.call("llvm.vector.reduce.add.v32i32", I32, q), I32(-128)), at.offset)
            if vnni and planes == 1:
                e.store(b.trunc(q, vector(I8, 32)), at.levels)
            elif vnni:
                upper = b.ashr(b.add(q, e.constant(I32(128), 32)), e.constant(I32(8), 32))
                e.store(b.trunc(upper, vector(I8, 32)), at.levels)
                e.store(b.trunc(q, vector(I8, 32)), b.add(at.levels, I64(32)))
            else:
                order = ir.Constant(ints, [I32(i & ~3 | IN_FOUR[i & 3]) for i in range(32)])
                e.store(b.trunc(b.shuffle_vector(q, q, order), vector(I16, 32)), at.levels)
            return context.get_dummy_value()

        return types.void(group), generate

    return step
