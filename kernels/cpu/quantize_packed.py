"""float32 to codes of 4, 5 or 6 bits in groups of 32 columns, with int8 scales: quant/formats/packed.py.

A row's factor brings the scale of its largest weight to 127. A group's scale is found by least squares
(`llvm.fit`) from candidates of either sign, near those that bring the largest weight to the end of the levels.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import Loadable
from rwkv_cli.kernels.cpu.args import F32_1, F32_2, F64_1, I8_2, U8_2, Int, unpack
from rwkv_cli.kernels.cpu.compile import FIXED_ORDER, function, kernel
from rwkv_cli.kernels.cpu.cores import usable_cores
from rwkv_cli.kernels.cpu.elementwise import address_of, fill, span
from rwkv_cli.kernels.cpu.llvm.bits import bits_of, float_of
from rwkv_cli.kernels.cpu.llvm.emitter import F32 as FLOAT
from rwkv_cli.kernels.cpu.llvm.emitter import I8, I16, I32, Emitter, vector
from rwkv_cli.kernels.cpu.llvm.fit import bring, clamped, fit, place, to_bytes, whole
from rwkv_cli.kernels.cpu.steps import Share, Steps
from rwkv_cli.kernels.cpu.team import TEAM
from rwkv_cli.numbers import CURVES, GROUP, LEVELS

_LEVELS4, _LEVELS5, _LEVELS6 = (np.array(LEVELS[bits], np.float32) for bits in (4, 5, 6))


def _code(e: Emitter, bits: int, t: Any) -> Any:
    """The code whose level is next to t in each lane, as bytes."""
    b, levels, n = e.b, LEVELS[bits], t.type.count
    if bits not in CURVES:
        return b.sub(to_bytes(e, nearest_level(e, bits, t)), e.constant(I8(levels[0]), n))
    # t is beyond the middle of two levels if ⌈2t⌉ is above their sum
    words = vector(I16, n)
    twice = e.call(f"llvm.ceil.v{n}f32", t.type, b.fmul(t, e.constant(FLOAT(2), n)))
    twice = b.trunc(b.fptosi(twice, vector(I32, n)), words)
    code = e.constant(I16(0), n)
    for low, high in pairwise(levels):
        code = b.sub(code, b.sext(b.icmp_signed(">", twice, e.constant(I16(low + high), n)), words))
    return b.trunc(code, vector(I8, n))


def _level(e: Emitter, bits: int, codes: Any) -> Any:
    """The levels of codes, as bytes."""
    b, levels, n = e.b, LEVELS[bits], codes.type.count
    if bits not in CURVES:
        return b.add(codes, e.constant(I8(levels[0]), n))
    low = b.and_(codes, e.constant(I8(15), n))
    found = e.lookup(levels[:16], low)
    if bits == 5:
        upper = b.icmp_unsigned(">", codes, e.constant(I8(15), n))
        found = b.select(upper, e.lookup(levels[16:], low), found)
    return found


def nearest_level(e: Emitter, bits: int, t: Any) -> Any:
    """A level that is next to t in each lane, or so near the middle of two that it hardly matters which."""
    b, levels, n = e.b, LEVELS[bits], t.type.count
    contract = ("contract",)
    if bits not in CURVES:
        return clamped(e, whole(e, t), levels[0], levels[-1])
    bend, shift = CURVES[bits]
    half = 1 << (bits - 1)
    # u(t) of level u · (bend + u²) · scale is found by an odd polynomial that was fitted to it
    squared = b.fmul(t, t)
    *inner, outer = (e.constant(FLOAT(c), n) for c in _inverse(bits))
    u = outer
    for c in reversed(inner):
        u = b.fadd(b.fmul(u, squared, flags=contract), c, flags=contract)
    u = b.fsub(b.fmul(u, t), e.constant(FLOAT(shift), n))
    u = b.fadd(clamped(e, whole(e, u), -half, half - 1), e.constant(FLOAT(shift), n))
    curve = b.fadd(b.fmul(u, u, flags=contract), e.constant(FLOAT(bend), n), flags=contract)
    return whole(e, b.fmul(b.fmul(curve, u), e.constant(FLOAT(_scale(bits)), n)))


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


def shares_of(bits: int, low: float, high: float, each: int) -> Sequence[float]:
    """Candidates for a group's scale as shares of its largest weight: `each` of either sign, even steps apart.

    They are `low` to `high` times the scale that brings that weight to the end of the levels.
    """
    return [share / end for end in (LEVELS[bits][0], LEVELS[bits][-1]) for share in np.linspace(low, high, each)]


def stored_scale(e: Emitter, scale: Any) -> Any:
    """The integer next to a scale, of at most ±127 and never 0."""
    found, n = clamped(e, whole(e, scale), -127, 127), scale.type.count
    return e.b.select(e.b.fcmp_ordered("==", found, e.constant(FLOAT(0), n)), e.constant(FLOAT(1), n), found)


def _fit(bits: int, low: float, high: float, each: int) -> Any:
    return fit(shares_of(bits, low, high, each), lambda e, t: nearest_level(e, bits, t), stored_scale)


def _place(bits: int) -> Any:
    return place(lambda e, t: _code(e, bits, t), lambda e, codes: _level(e, bits, codes))


_fit4, _fit5, _fit6 = _fit(4, 0.90, 1.05, 4), _fit(5, 0.96, 1.07, 4), _fit(6, 0.97, 1.07, 8)
_place4, _place5, _place6 = map(_place, (4, 5, 6))


@function(FIXED_ORDER)
def _best_scale(group, largest, bits):
    """The scale of the 32 float32 at address `group`."""
    if bits == 4:
        return _fit4(group, largest)
    if bits == 5:
        return _fit5(group, largest)
    return _fit6(group, largest)


@function(FIXED_ORDER)
def _codes(group, scale, bits, codes):
    """Put the codes of a group to address `codes`. Returns their squared error."""
    if bits == 4:
        return _place4(group, scale, codes)
    if bits == 5:
        return _place5(group, scale, codes)
    return _place6(group, scale, codes)


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
    room = np.empty(GROUP, np.float32)
    group = address_of(room)
    begin, end = span(part, parts, len(w))
    for n in range(begin, end):
        weights = w[n]
        top = np.int32(0)
        for k in range(K):
            top = max(top, bits_of(weights[k]) & np.int32(0x7FFFFFFF))
        row = row_factor(float_of(top), bits)
        a.rows[n] = row
        inverse = np.float32(1) / row if top else np.float32(0)
        error = np.float64(0)
        found, first, out = scales[n], address_of(weights), address_of(codes[n])
        for g in range(len(found)):
            source = first + 4 * GROUP * g
            if g == K // GROUP:
                source = fill(weights[g * GROUP :], room)
            largest = bring(source, inverse, group)
            scale = _best_scale(group, largest, bits) if abs(largest) > np.float32(0.5) else np.float32(0)
            error += np.float64(_codes(group, scale, bits, out + GROUP * g))
            found[g] = np.int64(scale)
        for k in range(K, codes.shape[1]):  # columns that only pad the row
            lost = levels[codes[n, k]] * np.float64(found[-1])
            error -= lost * lost
        a.errors[n] = error * np.float64(row) * np.float64(row)
    room[0] = 0  # it must live until here, and its address alone does not keep it


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
