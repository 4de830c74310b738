"""Steps that round a group of 32 weights x to levels times a scale. At addresses (int64) are the group's float32.

The scale is found by least squares. Each lane of a vector has a candidate s, and l(x) is the level next to x / s. With
A = Σx², D = Σ(x − l·s)² and P = Σ(x − l·s)·x, the scale that suits these levels best, and what is lost with it, are

    s* = s · (A − P) / M      M = Σ(l·s)² = A − 2P + D      Σ(x − l·s*)² = (A·D − P²) / M

and a scale k near s* loses (k / s − s* / s)² · M more. Sums come in one order, and what is fused is fixed, so that
every CPU with fused operations finds the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from rwkv_cli.kernels.cpu.llvm.emitter import F32, I1, I8, I32, I64, Emitter, vector
from rwkv_cli.numbers import GROUP

_FUSED = ("contract",)
_LANES = 16
"""Lanes of the loop over a group's weights, so many that no instruction waits for the one before."""

Step = Callable[[Emitter, Any], Any]
"""A function that emits what becomes of a vector."""


def clamped(e: Emitter, x: Any, low: float, high: float) -> Any:
    """Each lane, or the end that it is beyond."""
    for sign, end in ((">", low), ("<", high)):
        limit = e.constant(F32(end), x.type.count)
        x = e.b.select(e.b.fcmp_ordered(sign, x, limit), x, limit)
    return x


def whole(e: Emitter, x: Any) -> Any:
    """The integer next to each lane."""
    return e.call(f"llvm.rint.v{x.type.count}f32", x.type, x)


def _halved(e: Emitter, x: Any, join: Callable[[Any, Any], Any], count: int) -> Any:
    """Halves of all lanes joined until `count` lanes are left, so that every CPU takes them in the same order."""
    while x.type.count > count:
        half = x.type.count // 2
        x = join(e.lanes(x, range(half)), e.lanes(x, range(half, 2 * half)))
    return x


def _fused(e: Emitter, x: Any, y: Any, z: Any) -> Any:
    """x · y + z, where several products could be the one that is fused."""
    return e.call(f"llvm.fmuladd.v{x.type.count}f32", x.type, x, y, z)


def _squares(e: Emitter, x: Any) -> Any:
    """Σx²."""
    half = x.type.count // 2
    low, high = e.lanes(x, range(half)), e.lanes(x, range(half, 2 * half))
    return e.b.extract_element(_halved(e, _fused(e, high, high, e.b.fmul(low, low)), e.b.fadd, 1), I32(0))


def first_least(e: Emitter, total: Any) -> Any:
    """The first lane with the least total."""
    b, n = e.b, total.type.count
    least = _halved(e, total, lambda x, y: b.select(b.fcmp_ordered("<", x, y), x, y), 1)
    found = b.bitcast(b.fcmp_ordered("==", total, e.splat(b.extract_element(least, I32(0)), n)), ir.IntType(n))
    return b.cttz(b.zext(found, I32), I1(0))


def _bring(typingctx, weights, by, group):  # noqa: ARG001
    """Put 32 float32 times `by` to `group`. Returns the one of the largest magnitude, the negative one of two."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        e, b = Emitter(builder), builder
        weights, by, group = args
        x = b.fmul(e.load(vector(F32, GROUP), weights), e.splat(by, GROUP))
        e.store(x, group)
        # magnitudes order as their bits do, and the sign goes below them
        bits = b.bitcast(x, vector(I32, GROUP))
        keys = b.or_(b.shl(bits, e.constant(I32(1), GROUP)), b.lshr(bits, e.constant(I32(31), GROUP)))
        key = e.call(f"llvm.vector.reduce.umax.v{GROUP}i32", I32, keys)
        return b.bitcast(b.or_(b.lshr(key, I32(1)), b.shl(key, I32(31))), F32)

    return types.float32(types.int64, types.float32, types.int64), generate


bring: Any = intrinsic(_bring)


def fit(shares: Sequence[float], nearest: Step, kept: Step) -> Any:
    """fit(group, largest): the scale that loses least, of those that the candidates `largest` · shares lead to.

    `nearest` makes levels of x / s, and `kept` scales that can be stored of scales.
    """

    @intrinsic
    def fit_(typingctx, group, largest):  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b, count = Emitter(builder), builder, len(shares)
            group, largest = args
            scale = b.fmul(e.splat(largest, count), ir.Constant(vector(F32, count), [F32(share) for share in shares]))
            inverse = b.fdiv(e.constant(F32(1), count), scale)
            together = _LANES // count
            scales, inverses = (e.joined(*[v] * together) for v in (scale, inverse))

            def add(i: Any, sums: list[Any]) -> list[Any]:
                at = b.add(group, b.mul(i, I64(4)))
                x = e.joined(*(e.splat(e.load(F32, at, 4 * n, align=4), count) for n in range(together)))
                level = nearest(e, b.fmul(x, inverses))
                lost = b.fsub(x, b.fmul(level, scales, flags=_FUSED), flags=_FUSED)
                products = (b.fmul(lost, y, flags=_FUSED) for y in (lost, x))
                return [b.fadd(old, new, flags=_FUSED) for old, new in zip(sums, products, strict=True)]

            nothing = ir.Constant(vector(F32, _LANES), None)
            D, P = (
                _halved(e, total, b.fadd, count) for total in e.loop(I64(0), I64(GROUP), together, [nothing] * 2, add)
            )
            A = e.splat(_squares(e, e.load(vector(F32, GROUP), group)), len(shares))
            rest = b.fsub(A, P)
            M = b.fadd(b.fsub(rest, P), D)
            ratio = b.fdiv(rest, M)
            stored = kept(e, b.fmul(scale, ratio))
            off = _fused(e, stored, inverse, b.fneg(ratio))
            least = b.fdiv(_fused(e, A, D, b.fneg(b.fmul(P, P))), M)
            lost = b.fadd(least, b.fmul(b.fmul(off, off), M))
            return b.extract_element(stored, first_least(e, lost))

        return types.float32(types.int64, types.float32), generate

    return fit_


def place(code: Step, level: Step) -> Any:
    """place(group, scale, codes): round a group to its 32 bytes at address `codes`. Returns Σ(x − level · scale)².

    `code` makes bytes of x / scale, and `level` levels, as bytes, of these. A scale of 0 makes all x / scale 0.
    """

    @intrinsic
    def place_(typingctx, group, scale, codes):  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b = Emitter(builder), builder
            group, scale, codes = args
            inverse = b.select(b.fcmp_ordered("==", scale, F32(0)), F32(0), b.fdiv(F32(1), scale))
            x = e.load(vector(F32, GROUP), group)
            found = code(e, b.fmul(x, e.splat(inverse, GROUP)))
            e.store(found, codes)
            levels = b.sitofp(e.widen(level(e, found), I32), x.type)
            lost = b.fsub(x, b.fmul(levels, e.splat(scale, GROUP), flags=_FUSED), flags=_FUSED)
            return _squares(e, lost)

        return types.float32(types.int64, types.float32, types.int64), generate

    return place_


def to_bytes(e: Emitter, x: Any) -> Any:
    """Whole numbers as int8."""
    return e.b.trunc(e.b.fptosi(x, vector(I32, x.type.count)), vector(I8, x.type.count))
