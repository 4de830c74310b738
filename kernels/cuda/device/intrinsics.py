"""What kernels need of a GPU beyond numba's own: memory by address, int8 products, bits of floats.

Every function has a twin of the same name in `cuda_simulated`. Addresses are int64 and lie in global memory.
"""

import math
from collections.abc import Callable
from typing import Any

import numba.cuda
from llvmlite import ir
from numba.cuda.core import targetconfig
from numba.cuda.extending import intrinsic

types: Any = numba.cuda.types
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()

_function: Any = numba.cuda.jit(device=True)
exp, log = _function(lambda x: math.exp(x)), _function(lambda x: math.log(x))
sqrt, tanh = _function(lambda x: math.sqrt(x)), _function(lambda x: math.tanh(x))

_GLOBAL = 1
"""LLVM's address space of global memory."""


def _pointer(b: Any, address: Any, kind: Any) -> Any:
    return b.inttoptr(address, ir.PointerType(kind, _GLOBAL))


def _load(kind: Any, result: Any, widen: Callable[[Any, Any], Any] | None = None) -> Any:
    """A function (address) → the element of type `kind` there, made a `result` by `widen`."""

    def load(typingctx, address):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            value = b.load(_pointer(b, args[0], kind))
            return widen(b, value) if widen else value

        return result(types.int64), generate

    return intrinsic(load)


def _store(kind: Any, given: Any, narrow: Callable[[Any, Any], Any] | None = None) -> Any:
    """A function (address, value) that puts `value` there as a `kind`."""

    def store(typingctx, address, value):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            value = narrow(b, args[1]) if narrow else args[1]
            b.store(value, _pointer(b, args[0], kind))
            return context.get_dummy_value()

        return types.void(types.int64, given), generate

    return intrinsic(store)


f32 = _load(F32, types.float32)
i8 = _load(I8, types.int32, lambda b, value: b.sext(value, I32))
f16 = _load(I16, types.float32, lambda b, value: b.fpext(b.bitcast(value, F16), F32))
bf16 = _load(I16, types.float32, lambda b, value: b.bitcast(b.shl(b.zext(value, I32), I32(16)), F32))
i16 = _load(I16, types.int32, lambda b, value: b.sext(value, I32))
i32 = _load(I32, types.int32)
i64 = _load(I64, types.int64)
put_f32 = _store(F32, types.float32)
put_f64 = _store(F64, types.float64)
put_i32 = _store(I32, types.int64, lambda b, value: b.trunc(value, I32))
put_i16 = _store(I16, types.int64, lambda b, value: b.trunc(value, I16))
put_u8 = _store(I8, types.int64, lambda b, value: b.trunc(value, I8))


def _words(typingctx, address):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Four int32 at a multiple of 16, in one load."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        vector = b.load(_pointer(b, args[0], ir.VectorType(I32, 4)), align=16)
        parts = [b.extract_element(vector, I32(i)) for i in range(4)]
        return context.make_tuple(b, signature.return_type, parts)

    return types.UniTuple(types.int32, 4)(types.int64), generate


def _half(typingctx, word):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """The float16 in an int32's lower bits, as float32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return b.fpext(b.bitcast(b.trunc(args[0], I16), F16), F32)

    return types.float32(types.int32), generate


def _bits(typingctx, x):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """The bits of a float32 as int32."""
    return types.int32(types.float32), lambda _context, b, _signature, args: b.bitcast(args[0], I32)


def _float_of(typingctx, bits):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """The float32 that has these bits (int64, the upper half is ignored)."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return b.bitcast(b.trunc(args[0], I32), F32)

    return types.float32(types.int64), generate


def _through_half(typingctx, x):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """float32 rounded to the nearest float16, ties to even, as float32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return b.fpext(b.fptrunc(args[0], F16), F32)

    return types.float32(types.float32), generate


def _rounded(typingctx, x):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """float32 to the nearest int32, ties to even; NaN is 0."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return b.call(ir.InlineAsm(ir.FunctionType(I32, [F32]), "cvt.rni.s32.f32 $0, $1;", "=r,f"), args)

    return types.int32(types.float32), generate


def _dp4a(typingctx, a, b, c):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """c + Σ of the products of the four int8 in a and in b."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        kind = ir.FunctionType(I32, [I32] * 3)
        return builder.call(ir.InlineAsm(kind, "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r"), args)

    return types.int32(types.int32, types.int32, types.int32), generate


def _mma(b: Any, shape: str, parts: list[Any], sums: list[Any]) -> list[Any]:
    """One int8 mma.sync of `shape`: `parts` are the registers of A and B, `sums` those of C."""
    n, at, groups = len(sums), 0, []
    for count in (n, len(parts) - max(1, len(parts) // 3), max(1, len(parts) // 3), n):
        groups.append("{" + ", ".join(f"${at + i}" for i in range(count)) + "}")
        at += count
    text = f"mma.sync.aligned.{shape}.row.col.s32.s8.s8.s32 {', '.join(groups)};"
    constraints = ",".join(["=r"] * n + ["r"] * (len(parts) + n))
    kind = ir.FunctionType(ir.LiteralStructType([I32] * n), [I32] * (len(parts) + n))
    # the whole warp takes part: volatile, so that it is moved into no branch
    done = b.call(ir.InlineAsm(kind, text, constraints, side_effect=True), [*parts, *sums])
    return [b.extract_value(done, i) for i in range(n)]


def _products(typingctx, weights, levels, weights_at, levels_at, lane):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """A warp's 16 rows × 8 tokens over 32 columns: Σ w·(256·high + low), int32, four of them in each lane.

    weights, levels: this lane's words of a weight and an activation fragment (docs/cuda.md), which lie at weights_at
    and levels_at. Lane 4g + t gets (row g, token 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        w = [b.extract_value(args[0], i) for i in range(4)]
        high, low = ([b.extract_value(args[1], i) for i in pair] for pair in ((0, 1), (2, 3)))
        capability = targetconfig.ConfigStack().top().compute_capability

        def multiply(x: list[Any], sums: list[Any]) -> list[Any]:
            if capability >= (8, 0):
                return _mma(b, "m16n8k32", [*w, *x], sums)
            # Turing's tensor cores take 8 rows × 8 tokens × 16 columns at a time
            for half, row in ((0, 0), (1, 0), (0, 1), (1, 1)):
                sums[2 * row : 2 * row + 2] = _mma(
                    b, "m8n8k16", [w[2 * half + row], x[half]], sums[2 * row : 2 * row + 2]
                )
            return sums

        sums = [b.shl(total, I32(8)) for total in multiply(high, [I32(0)] * 4)]
        return context.make_tuple(b, signature.return_type, multiply(low, sums))

    four = types.UniTuple(types.int32, 4)
    return four(four, four, types.int64, types.int64, types.int64), generate


words: Any = intrinsic(_words)
half: Any = intrinsic(_half)
bits: Any = intrinsic(_bits)
float_of: Any = intrinsic(_float_of)
through_half: Any = intrinsic(_through_half)
rounded: Any = intrinsic(_rounded)
dp4a: Any = intrinsic(_dp4a)
products: Any = intrinsic(_products)
