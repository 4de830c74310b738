"""float32 to int8 in groups of 32 columns with float16 scales, 8.5 bits a weight.

A group's scale is found by least squares (`llvm.fit`) from 16 candidates, upward from the one that brings the largest
weight to −128. So it has a fifth less squared error than with absmax/127 (Q8_0).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import Loadable
from rwkv_cli.kernels.cpu.args import F32, F32_2, F64_1, I8_2, U16_2, unpack
from rwkv_cli.kernels.cpu.compile import FIXED_ORDER, kernel
from rwkv_cli.kernels.cpu.cores import usable_cores
from rwkv_cli.kernels.cpu.elementwise import address_of, fill, span
from rwkv_cli.kernels.cpu.llvm.bits import bits_of
from rwkv_cli.kernels.cpu.llvm.emitter import F32 as FLOAT
from rwkv_cli.kernels.cpu.llvm.emitter import I32, Emitter, vector
from rwkv_cli.kernels.cpu.llvm.fit import bring, clamped, fit, place, to_bytes, whole
from rwkv_cli.kernels.cpu.steps import Share, Steps
from rwkv_cli.kernels.cpu.team import TEAM
from rwkv_cli.numbers import GROUP

_SHARES = [share / 128 for share in np.linspace(1, 1.07, 16)]
"""Candidates for the scale of a group as shares of its largest weight."""
_SUBNORMAL = 2.0**112
"""The factor from float32 numbers whose bits are those of a float16, 13 places up, to the number itself."""


def _half(e: Emitter, scale: Any) -> Any:
    """The float16 number above 0 next to each lane."""
    b, n = e.b, scale.type.count
    ints = vector(I32, n)
    bits = b.bitcast(b.fmul(scale, e.constant(FLOAT(1 / _SUBNORMAL), n)), ints)
    bits = b.lshr(b.add(bits, e.constant(I32(1 << 12), n)), e.constant(I32(13), n))
    one = e.constant(I32(1), n)
    bits = b.select(b.icmp_signed(">", bits, one), bits, one)
    return b.fmul(b.bitcast(b.shl(bits, e.constant(I32(13), n)), scale.type), e.constant(FLOAT(_SUBNORMAL), n))


def _nearest(e: Emitter, t: Any) -> Any:
    return clamped(e, whole(e, t), -128, 127)


_fit = fit(_SHARES, _nearest, _half)
_place = place(lambda e, t: to_bytes(e, _nearest(e, t)), lambda _, values: values)


class QuantizeRowsArgs(NamedTuple):
    """w [R, K]; `by`, the factor that brings w to the tensor's unit; values [R, K padded], scales [R, K/32];
    squared errors [R]."""

    w: F32_2
    by: F32
    values: I8_2
    scales: U16_2
    errors: F64_1


@kernel(QuantizeRowsArgs, FIXED_ORDER)
def _quantize(args: int, part: int, parts: int) -> None:
    """Round each row of w · by to values and scales."""
    a = unpack(args, QuantizeRowsArgs)
    w, unit, values, scales = a.w, a.by, a.values, a.scales
    K = w.shape[1]
    room = np.empty(GROUP, np.float32)
    group = address_of(room)
    begin, end = span(part, parts, len(w))
    for n in range(begin, end):
        error = np.float64(0)
        weights, found = w[n], scales[n]
        first, out = address_of(weights), address_of(values[n])
        for g in range(len(found)):
            source = first + 4 * GROUP * g
            if g == K // GROUP:
                source = fill(weights[g * GROUP :], room)
            largest = abs(bring(source, unit, group))
            # below half of 127 times the least float16, zeros are as good
            scale = _fit(group, largest) if largest > np.float32(2.0**-18) else np.float32(0)
            error += np.float64(_place(group, scale, out + GROUP * g))
            found[g] = bits_of(scale * np.float32(1 / _SUBNORMAL)) >> np.int32(13)
        a.errors[n] = error / (np.float64(unit) * np.float64(unit))
    room[0] = 0  # it must live until here, and its address alone does not keep it


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
