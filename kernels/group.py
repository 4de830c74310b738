"""LLVM code for the inner step of the int8 matmul: one group of 32 columns, some strips of 16 rows, some tokens.

    y[t, s·16 + i] += (Σ_c w[s, c, i] · a[t, c]) · scale[s, i] · factor[t]      i < 16, c < 32

The sum is exact in int32; the rest is float32. Weights lie in tiles of 16 rows × 4 columns, so that one instruction
multiplies a tile with 4 activations and adds each row's 4 products into its own lane: no horizontal sums.

Activations are int16 (quantized to ±32512 in the same groups of 32). Two forms of the same sum:

- AVX-512 VNNI: `vpdpbusd` multiplies unsigned by signed bytes, so a weight w enters as w + 128 (one xor) and an
  activation as two signed planes, a = 256·high + low. `offset[t]` = 128 · Σ_c a[t, c] takes the 128 back out.
- Portable: both are widened to 16 bits, multiplied and added in pairs, which LLVM turns into `pmaddwd` on x86.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
TILES = 8
"""Tiles of 4 columns in a group of 32."""
TILE_BYTES = 64


def _vector(element: Any, n: int) -> Any:
    return ir.VectorType(element, n)


class _Emitter:
    """Small vocabulary over an IR builder: addresses are i64, vectors are loaded unaligned."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def load(self, kind: Any, address: Any, offset: int = 0) -> Any:
        place = self.b.add(address, I64(offset)) if offset else address
        value = self.b.load(self.b.inttoptr(place, kind.as_pointer()))
        value.align = 1
        return value

    def store(self, value: Any, address: Any) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer())).align = 1

    def splat(self, scalar: Any, n: int) -> Any:
        one = self.b.insert_element(ir.Constant(_vector(scalar.type, n), ir.Undefined), scalar, I32(0))
        return self.b.shuffle_vector(one, one, ir.Constant(_vector(I32, n), None))

    def pick(self, vector: Any, lanes: range) -> Any:
        mask = ir.Constant(_vector(I32, len(lanes)), [I32(i) for i in lanes])
        return self.b.shuffle_vector(vector, vector, mask)

    def widen(self, vector: Any, element: Any) -> Any:
        return self.b.sext(vector, _vector(element, vector.type.count))


def _sums_vnni(e: _Emitter, strips: list[Any], tokens: list[Any], plane: Any) -> dict[tuple[int, int], Any]:
    """256·Σ(w+128)·high + Σ(w+128)·low for each strip and token, <16 x i32>."""
    b, wide = e.b, _vector(I32, 16)
    bytes_ = _vector(I8, TILE_BYTES)
    dot = get_or_insert_function(
        b.module, ir.FunctionType(wide, [wide, bytes_, bytes_]), "llvm.x86.avx512.vpdpbusd.512"
    )
    flip = ir.Constant(bytes_, [I8(-128)] * TILE_BYTES)
    zero = ir.Constant(wide, None)
    high = {(s, t): zero for s in range(len(strips)) for t in range(len(tokens))}
    low = dict(high)
    for tile in range(TILES):
        w = [b.xor(e.load(bytes_, strip, tile * TILE_BYTES), flip) for strip in strips]
        for t, token in enumerate(tokens):
            for sums, address in ((high, token), (low, b.add(token, plane))):
                a = b.bitcast(e.splat(e.load(I32, address, tile * 4), 16), bytes_)
                for s in range(len(strips)):
                    sums[s, t] = b.call(dot, [sums[s, t], w[s], a])
    shift = ir.Constant(wide, [I32(8)] * 16)
    return {key: b.add(b.shl(high[key], shift), low[key]) for key in high}


def _sums_portable(e: _Emitter, strips: list[Any], tokens: list[Any]) -> dict[tuple[int, int], Any]:
    """Σ w·a for each strip and token, <16 x i32>."""
    b = e.b
    even, odd = range(0, 64, 2), range(1, 64, 2)
    sums: dict[tuple[int, int], Any] = {}
    for tile in range(TILES):
        w = [e.widen(e.load(_vector(I8, TILE_BYTES), strip, tile * TILE_BYTES), I16) for strip in strips]
        for t, token in enumerate(tokens):
            a = b.bitcast(e.splat(e.load(I64, token, tile * 8), 16), _vector(I16, 64))
            for s in range(len(strips)):
                pairs = b.add(
                    b.mul(e.widen(e.pick(w[s], even), I32), e.widen(e.pick(a, even), I32)),
                    b.mul(e.widen(e.pick(w[s], odd), I32), e.widen(e.pick(a, odd), I32)),
                )
                sums[s, t] = b.add(sums[s, t], pairs) if (s, t) in sums else pairs
    return {key: b.add(e.pick(pairs, range(0, 32, 2)), e.pick(pairs, range(1, 32, 2))) for key, pairs in sums.items()}


def group_step(strips: int, tokens: int, vnni: bool) -> Callable[..., None]:
    """The step for `strips` × `tokens` as a function of addresses and byte strides, callable from a kernel.

    Arguments, all int64: w, w_stride (tiles of a strip) · a, a_stride, a_plane (activations of a token; distance of
    the low plane) · scale, scale_stride (float16 bits) · factor, factor_stride (float32) · offset, offset_stride
    (int32) · y, y_stride (float32). A stride leads to the next strip for w and scale, to the next token for a, factor,
    offset and y; strips are neighbours in y. `factor` includes 2**112, since float16 bits shifted into a float32
    stand for 2**-112 of their value.
    """

    @intrinsic
    def step(  # type: ignore[no-untyped-def]
        typingctx, w, w_stride, a, a_stride, a_plane, scale, scale_stride,  # noqa: ARG001
        factor, factor_stride, offset, offset_stride, y, y_stride,  # noqa: ARG001
    ):  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b = _Emitter(builder), builder
            (
                w,
                w_stride,
                a,
                a_stride,
                a_plane,
                scale,
                scale_stride,
                factor,
                factor_stride,
                offset,
                offset_stride,
                y,
                y_stride,
            ) = args

            def steps(base: Any, stride: Any, n: int) -> list[Any]:
                return [b.add(base, b.mul(stride, I64(i))) for i in range(n)]

            rows, columns = steps(w, w_stride, strips), steps(a, a_stride, tokens)
            sums = _sums_vnni(e, rows, columns, a_plane) if vnni else _sums_portable(e, rows, columns)
            scales = []
            for place in steps(scale, scale_stride, strips):
                half = b.zext(e.load(_vector(I16, 16), place), _vector(I32, 16))
                half = b.shl(half, ir.Constant(_vector(I32, 16), [I32(13)] * 16))
                scales.append(b.bitcast(half, _vector(F32, 16)))
            factors, offsets = steps(factor, factor_stride, tokens), steps(offset, offset_stride, tokens)
            for t, out in enumerate(steps(y, y_stride, tokens)):
                by = e.splat(e.load(F32, factors[t]), 16)
                less = e.splat(e.load(I32, offsets[t]), 16) if vnni else None
                for s in range(strips):
                    total = b.sub(sums[s, t], less) if vnni else sums[s, t]
                    real = b.sitofp(total, _vector(F32, 16))
                    place = b.add(out, I64(64 * s))
                    product = b.fmul(real, b.fmul(scales[s], by), flags=("contract",))
                    e.store(b.fadd(e.load(_vector(F32, 16), place), product, flags=("contract",)), place)
            return context.get_dummy_value()

        return types.void(*([types.int64] * 13)), generate

    return step


def pair_step(vnni: bool) -> Callable[..., None]:
    """total[i] += first[i] · p + second[i] · q for 16 outputs i, where two inputs p and q of one group are not zero.

    Arguments, all int64: addresses of 16 weights of either row (int8), `levels` (p in the low 16 bits, q in the high
    ones) and the address of `total` (int32). Bytes of both rows are interleaved, so that one `vpdpwssd` (or `pmaddwd`)
    adds both products into an output's lane.
    """

    @intrinsic
    def step(typingctx, first, second, levels, total):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b, wide = _Emitter(builder), builder, _vector(I32, 16)
            first, second, levels, total = args
            rows = [e.load(_vector(I8, 16), place) for place in (first, second)]
            order = ir.Constant(_vector(I32, 32), [I32(i // 2 + 16 * (i % 2)) for i in range(32)])
            w = e.widen(b.shuffle_vector(*rows, order), I16)
            a = b.bitcast(e.splat(b.trunc(levels, I32), 16), w.type)
            old = e.load(wide, total)
            if vnni:
                kind = ir.FunctionType(wide, [wide, wide, wide])
                dot = get_or_insert_function(b.module, kind, "llvm.x86.avx512.vpdpwssd.512")
                e.store(b.call(dot, [old, b.bitcast(w, wide), b.bitcast(a, wide)]), total)
            else:
                even, odd = range(0, 32, 2), range(1, 32, 2)
                products = [b.mul(e.widen(e.pick(w, half), I32), e.widen(e.pick(a, half), I32)) for half in (even, odd)]
                e.store(b.add(old, b.add(*products)), total)
            return context.get_dummy_value()

        return types.void(*([types.int64] * 4)), generate

    return step


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


def quantize_step(vnni: bool, levels: int) -> Callable[..., None]:
    """32 float32 activations to integers of at most ±`levels`, in the form that `group_step` takes.

    Arguments: addresses (int64) of x, of the high and the low plane (the same for int16), of factor and offset, and
    `unit` (float32). factor = max|x| / levels · unit; a NaN or infinity makes it NaN.
    """

    @intrinsic
    def step(typingctx, x, high, low, factor, offset, unit):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b = _Emitter(builder), builder
            x, high, low, factor, offset, unit = args
            ints, floats = _vector(I32, 32), _vector(F32, 32)

            def call(name: str, result: Any, *values: Any) -> Any:
                kind = ir.FunctionType(result, [value.type for value in values])
                return b.call(get_or_insert_function(b.module, kind, name), list(values))

            def all_(value: int) -> Any:
                return ir.Constant(ints, [I32(value)] * 32)

            value = e.load(floats, x)
            # magnitudes order as their bits do, and what is not finite comes last
            bits = call("llvm.vector.reduce.umax.v32i32", I32, b.and_(b.bitcast(value, ints), all_(0x7FFFFFFF)))
            top = b.bitcast(bits, F32)
            poison = b.fmul(top, F32(0))
            inverse = b.select(b.fcmp_ordered(">", top, F32(1e-30)), b.fdiv(F32(levels), top), F32(0))
            scale = b.fmul(b.fmul(top, F32(float(np.float32(1 / levels)))), unit)
            e.store(b.fadd(scale, poison), factor)
            scaled = call("llvm.rint.v32f32", floats, b.fmul(value, e.splat(inverse, 32)))
            q = call("llvm.fptosi.sat.v32i32.v32f32", ints, scaled)
            total = call("llvm.vector.reduce.add.v32i32", I32, q)
            e.store(b.mul(total, I32(128)), offset)
            if vnni:
                upper = b.ashr(b.add(q, all_(128)), all_(8))
                e.store(b.trunc(upper, _vector(I8, 32)), high)
                e.store(b.trunc(b.sub(q, b.shl(upper, all_(8))), _vector(I8, 32)), low)
            else:
                e.store(b.trunc(q, _vector(I16, 32)), high)
            return context.get_dummy_value()

        return types.void(*([types.int64] * 5), types.float32), generate

    return step
