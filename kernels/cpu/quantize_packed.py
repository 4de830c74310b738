"""float32 to codes of 4, 5 or 6 bits in groups of 32 columns, with int8 scales: quant/formats/packed.py.

A row's factor brings the scale of its largest weight to 127. A group's scale is found by search: of either sign, eight
integers are tried from about the one that brings the largest weight to the end of the levels downward, and the one with
the least squared error wins.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import Loadable
from rwkv_cli.kernels.cpu.args import F32_1, F32_2, F64_1, I8_2, U8_2, Int, unpack
from rwkv_cli.kernels.cpu.compile import FIXED_ORDER, function, kernel
from rwkv_cli.kernels.cpu.cores import usable_cores
from rwkv_cli.kernels.cpu.elementwise import address_of, span
from rwkv_cli.kernels.cpu.llvm.emitter import F32 as FLOAT
from rwkv_cli.kernels.cpu.llvm.emitter import I1, I8, I32, I64, Emitter, vector
from rwkv_cli.kernels.cpu.steps import Share, Steps
from rwkv_cli.kernels.cpu.team import TEAM
from rwkv_cli.numbers import CURVES, GROUP, LEVELS

_SEARCHED = {4: (0.86, 1.08), 5: (0.94, 1.04), 6: (0.97, 1.03)}
"""Where candidates lie, as a share of the scale that brings the largest weight to the end of the levels."""
LANES = 16
"""Lanes of vectors. A lane is a candidate: of one sign in the lower half, of the other in the upper half."""

_LEVELS4, _LEVELS5, _LEVELS6 = (np.array(LEVELS[bits], np.float32) for bits in (4, 5, 6))


def _clamped(e: Emitter, x: Any, low: float, high: float) -> Any:
    for sign, end in ((">", low), ("<", high)):
        limit = e.constant(FLOAT(end), x.type.count)
        x = e.b.select(e.b.fcmp_ordered(sign, x, limit), x, limit)
    return x


def _code(e: Emitter, bits: int, t: Any) -> Any:
    """The code whose level is next to t in each lane, as float32."""
    b, levels, n = e.b, LEVELS[bits], t.type.count
    if bits not in CURVES:
        whole = e.call(f"llvm.rint.v{n}f32", t.type, b.fsub(t, e.constant(FLOAT(levels[0]), n)))
        return _clamped(e, whole, 0, len(levels) - 1)
    q = e.constant(FLOAT(0), n)
    for code, (low, high) in enumerate(pairwise(levels), 1):
        q = b.select(b.fcmp_ordered(">", t, e.constant(FLOAT((low + high) / 2), n)), e.constant(FLOAT(code), n), q)
    return q


def nearest_level(e: Emitter, bits: int, t: Any) -> Any:
    """A level that is next to t in each lane, or so near the middle of two that it hardly matters which."""
    b, levels, n = e.b, LEVELS[bits], t.type.count
    rint, contract = f"llvm.rint.v{n}f32", ("contract",)
    if bits not in CURVES:
        return _clamped(e, e.call(rint, t.type, t), levels[0], levels[-1])
    bend, shift = CURVES[bits]
    half = 1 << (bits - 1)
    # u(t) of level u · (bend + u²) · scale is found by an odd polynomial that was fitted to it
    squared = b.fmul(t, t)
    *inner, outer = (e.constant(FLOAT(c), n) for c in _inverse(bits))
    u = outer
    for c in reversed(inner):
        u = b.fadd(b.fmul(u, squared, flags=contract), c, flags=contract)
    u = b.fsub(b.fmul(u, t), e.constant(FLOAT(shift), n))
    u = b.fadd(_clamped(e, e.call(rint, t.type, u), -half, half - 1), e.constant(FLOAT(shift), n))
    curve = b.fadd(b.fmul(u, u, flags=contract), e.constant(FLOAT(bend), n), flags=contract)
    return e.call(rint, t.type, b.fmul(b.fmul(curve, u), e.constant(FLOAT(_scale(bits)), n)))


def _scale(bits: int) -> float:
    """The factor that brings u · (bend + u²) to levels."""
    bend, shift = CURVES[bits]
    end = (1 << (bits - 1)) - shift
    return 127 / (end * (bend + end * end))


def _inverse(bits: int) -> list[float]:
    """Coefficients of t, t³, t⁵, … of the polynomial that turns a level into u."""
    bend, shift = CURVES[bits]
    half = 1 << (bits - 1)
    u = np.linspace(-half + shift, half - 1 + shift, 4001)
    powers = range(1, {4: 11, 5: 13}[bits], 2)
    t = u * (bend + u * u) * (_scale(bits) / 127)
    fitted = np.linalg.lstsq(np.stack([t**i for i in powers], axis=1), u, rcond=None)[0]
    return [float(c / 127.0**i) for c, i in zip(fitted, powers, strict=True)]


def _round(bits: int) -> Any:
    """round(x, inverse, codes): put the codes next to x · inverse, 32 float32 at address `x`, to 32 bytes."""

    @intrinsic
    def round_(typingctx, x, inverse, codes):  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b = Emitter(builder), builder
            x, inverse, codes = args
            t = b.fmul(e.load(vector(FLOAT, GROUP), x), e.splat(inverse, GROUP))
            found = _code(e, bits, t)
            e.store(b.trunc(b.fptosi(found, vector(I32, GROUP)), vector(I8, GROUP)), codes)
            return context.get_dummy_value()

        return types.void(types.int64, types.float32, types.int64), generate

    return round_


def scales_tried(e: Emitter, bits: int, largest: Any) -> Any:
    """The scales that are tried for a group whose weight of the largest magnitude is `largest`: integers, none of 0."""
    b, floats = e.b, vector(FLOAT, LANES)
    low, high = _SEARCHED[bits]
    half = LANES // 2
    shares = [
        (low + (high - low) * i / (half - 1)) / end for end in (LEVELS[bits][0], LEVELS[bits][-1]) for i in range(half)
    ]
    scale = b.fmul(e.splat(largest, LANES), ir.Constant(floats, [FLOAT(share) for share in shares]))
    scale = _clamped(e, e.call(f"llvm.rint.v{LANES}f32", floats, scale), -127, 127)
    return b.select(b.fcmp_ordered("==", scale, e.constant(FLOAT(0), LANES)), e.constant(FLOAT(1), LANES), scale)


def first_least(e: Emitter, total: Any) -> Any:
    """The first lane with the least total."""
    b = e.b
    least = e.call(f"llvm.vector.reduce.fmin.v{LANES}f32", FLOAT, total)
    found = b.bitcast(b.fcmp_ordered("==", total, e.splat(least, LANES)), ir.IntType(LANES))
    return b.zext(b.cttz(found, I1(0)), I32)


def _search(bits: int) -> Any:
    """search(group, largest): the scale, int64, with the least Σ (x − level · scale)².

    x are the 32 float32 at address `group`. `largest` is the x that is largest in magnitude.
    """

    @intrinsic
    def search(typingctx, group, largest):  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b, floats = Emitter(builder), builder, vector(FLOAT, LANES)
            group, largest = args
            scale = scales_tried(e, bits, largest)
            inverse = b.fdiv(e.constant(FLOAT(1), LANES), scale)

            def add_error(i: Any, carried: list[Any]) -> list[Any]:
                x = e.splat(e.load(FLOAT, b.add(group, b.mul(i, I64(4))), align=4), LANES)
                q = nearest_level(e, bits, b.fmul(x, inverse))
                d = b.fsub(x, b.fmul(q, scale, flags=("contract",)), flags=("contract",))
                return [b.fadd(carried[0], b.fmul(d, d))]

            (total,) = e.loop(I64(0), I64(GROUP), 1, [ir.Constant(floats, None)], add_error)
            return b.fptosi(b.extract_element(scale, first_least(e, total)), I64)

        return types.int64(types.int64, types.float32), generate

    return search


_search4, _search5, _search6 = map(_search, (4, 5, 6))
_round4, _round5, _round6 = map(_round, (4, 5, 6))


@function(FIXED_ORDER)
def best_scale(x, bits):
    """The scale of a group x [32], as `_search` finds it; 0 for zeros."""
    largest = np.float32(0)
    for i in range(GROUP):
        if abs(x[i]) > abs(largest):
            largest = x[i]
    if largest == 0:
        return np.int64(0)
    if bits == 4:
        return _search4(address_of(x), largest)
    if bits == 5:
        return _search5(address_of(x), largest)
    return _search6(address_of(x), largest)


@function(FIXED_ORDER)
def nearest(x, scale, bits, codes):
    """codes[i] = the code whose level · scale is next to x[i], for a group x [32]."""
    inverse = np.float32(1) / np.float32(scale) if scale else np.float32(0)
    if bits == 4:
        _round4(address_of(x), inverse, address_of(codes))
    elif bits == 5:
        _round5(address_of(x), inverse, address_of(codes))
    else:
        _round6(address_of(x), inverse, address_of(codes))


class PackRowsArgs(NamedTuple):
    """w [R, K]; codes [R, K padded], scales [R, K/32], rows [R]; squared errors [R]."""

    w: F32_2
    bits: Int
    codes: U8_2
    scales: I8_2
    rows: F32_1
    errors: F64_1


@kernel(PackRowsArgs, FIXED_ORDER)
def _pack(args: int, part: int, parts: int) -> None:
    """Round each row of w to codes, scales and a factor of the row."""
    a = unpack(args, PackRowsArgs)
    w, bits, codes, scales = a.w, a.bits, a.codes, a.scales
    K = w.shape[1]
    levels = _LEVELS4 if bits == 4 else _LEVELS5 if bits == 5 else _LEVELS6
    group = np.empty(GROUP, np.float32)
    begin, end = span(part, parts, len(w))
    for n in range(begin, end):
        top = np.float32(0)
        for k in range(K):
            top = max(top, abs(w[n, k]))
        row = row_factor(top, bits)
        a.rows[n] = row
        inverse = np.float32(1) / row if top else np.float32(0)
        error = np.float64(0)
        for g in range(scales.shape[1]):
            source, out = w[n, g * GROUP : min((g + 1) * GROUP, K)], codes[n, g * GROUP : (g + 1) * GROUP]
            group[:] = 0
            for i in range(len(source)):
                group[i] = source[i] * inverse
            scale = best_scale(group, bits)
            scales[n, g] = scale
            nearest(group, scale, bits, out)
            by = np.float32(scale) * row
            for i in range(len(source)):
                d = np.float64(source[i] - levels[out[i]] * by)
                error += d * d
        a.errors[n] = error


@function()
def row_factor(top, bits):
    """The factor of a row whose largest weight is `top` in magnitude: with it, no scale needs to be above 127."""
    last = _LEVELS4[-1] if bits == 4 else _LEVELS5[-1] if bits == 5 else _LEVELS6[-1]
    return top / (last * np.float32(127))


KERNELS: list[Loadable] = [TEAM, _pack]
"""The kernels of `pack_rows`."""


def pack_rows(
    w: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.float32], float]:
    """Codes [R, K padded], int8 scales [R, K/32], rows [R] and the squared error of the rows `w` [R, K]."""
    groups = -(-w.shape[1] // GROUP)
    codes = np.empty((len(w), groups * GROUP), np.uint8)
    scales = np.empty((len(w), groups), np.int8)
    rows, errors = np.empty(len(w), np.float32), np.zeros(len(w))
    threads = usable_cores().physical
    steps = Steps()
    steps.add(
        _pack,
        PackRowsArgs(np.ascontiguousarray(w), bits, codes, scales, rows, errors),
        Share.fixed(min(len(w), 8 * threads)),
    )
    steps.finish().run(threads)
    return codes, scales, rows, float(errors.sum())
