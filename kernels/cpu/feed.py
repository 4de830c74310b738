"""The kernels of rounding with error feedback: `feedback` has the formula, and what goes on between them."""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import Loadable
from rwkv_cli.kernels.cpu.args import F32_1, F32_2, F64_1, I8_2, U8_2, U16_2, Int, unpack
from rwkv_cli.kernels.cpu.compile import function, kernel
from rwkv_cli.kernels.cpu.elementwise import address_of, span
from rwkv_cli.kernels.cpu.llvm.bits import bits_of, float_of
from rwkv_cli.kernels.cpu.llvm.emitter import F32 as FLOAT
from rwkv_cli.kernels.cpu.llvm.emitter import I64, Emitter, vector
from rwkv_cli.kernels.cpu.llvm.fit import first_least
from rwkv_cli.kernels.cpu.quantize_packed import nearest_level, shares_of, stored_scale
from rwkv_cli.numbers import GROUP, LEVELS

CANDIDATES, STEP = 24, 3
"""float16 numbers that are tried as the scale of a group of int8, from absmax/128 upward, and their distance."""
_SEARCHED = {4: (0.86, 1.08), 5: (0.94, 1.04), 6: (0.97, 1.03)}
"""The range of the candidates of codes, as `shares_of` takes it."""
LANES = 16
"""Candidates of codes, half of them of either sign."""


def _codes(bits: int) -> NDArray[np.uint8]:
    """The code of each level, at its place from −128 on."""
    codes = np.zeros(256, np.uint8)
    codes[np.array(LEVELS[bits]) + 128] = np.arange(len(LEVELS[bits]))
    return codes


_CODES4, _CODES5, _CODES6 = map(_codes, (4, 5, 6))


def _feed(typingctx, lost, shares, rows, first):  # noqa: ARG001
    """rows[j] += lost · shares[j] for j from `first` to GROUP − 1, which is one row at least.

    At the addresses are float32: lost [CANDIDATES], shares [GROUP], rows [GROUP, CANDIDATES].
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        e, b, kind = Emitter(builder), builder, vector(FLOAT, CANDIDATES)
        lost, shares, rows, first = args
        gone = e.load(kind, lost, align=4)

        def add(j: Any, _: list[Any]) -> list[Any]:
            share = e.splat(e.load(FLOAT, b.add(shares, b.mul(j, I64(4))), align=4), CANDIDATES)
            row = b.add(rows, b.mul(j, I64(4 * CANDIDATES)))
            product = b.fmul(gone, share, flags=("contract",))
            e.store(b.fadd(e.load(kind, row, align=4), product, flags=("contract",)), row, align=4)
            return []

        e.loop(first, I64(GROUP), 1, [], add)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64, types.int64), generate


feed: Any = intrinsic(_feed)


class FeedbackArgs(NamedTuple):
    """w, x [R, B] of B columns, x with the feedback of the columns before them; C [B, B] and d [B] of these columns;
    `by`, the factor that brings w and x to the tensor's unit; values [R, B], scales [R, B/32], Δ [R, B] in that unit;
    and the sums of d·(x − q)² [R] to add to."""

    w: F32_2
    x: F32_2
    carry: F32_2
    weight: F32_1
    values: I8_2
    scales: U16_2
    lost: F32_2
    errors: F64_1


@function()
def gather(group, x, lost, carry, start):
    """group = x[start : start + GROUP] + lost[:start] · carry[:start, start : start + GROUP], all of one row."""
    for i in range(GROUP):
        group[i] = x[start + i]
    for k in range(start):
        for i in range(GROUP):
            group[i] += lost[k] * carry[k, start + i]


@kernel(FeedbackArgs)
def round_(args: int, part: int, parts: int) -> None:
    """Round each row with feedback."""
    a = unpack(args, FeedbackArgs)
    w, x, carry, weight, lost = a.w, a.x, a.carry, a.weight, a.lost
    B = w.shape[1]
    now = np.empty((GROUP, CANDIDATES), np.float32)
    level = np.empty((GROUP, CANDIDATES), np.float32)
    scale, inverse = np.empty(CANDIDATES, np.float32), np.empty(CANDIDATES, np.float32)
    gone, error = np.empty(CANDIDATES, np.float32), np.empty(CANDIDATES, np.float32)
    group = np.empty(GROUP, np.float32)
    begin, end = span(part, parts, len(w))
    for n in range(begin, end):
        for start in range(0, B, GROUP):
            gather(group, x[n], lost[n], carry, start)
            top = np.int32(0)
            for i in range(GROUP):
                top = max(top, bits_of(group[i]) & np.int32(0x7FFFFFFF))
            # float16 bits of top/128, rounded down: the exponent is rebased from 127 to 15
            base = float_of(top) / np.float32(128)
            if base >= np.float32(2.0**-14):
                first = np.int64((bits_of(base) >> np.int32(13)) - np.int32(112 << 10))
            else:
                first = np.int64(base * np.float32(2.0**24))
            for c in range(CANDIDATES):
                bits = max(np.int64(1), first + c * STEP)
                scale[c] = float_of(np.int32(bits << np.int64(13))) * np.float32(2.0**112)
                inverse[c] = np.float32(1) / scale[c]
                error[c] = 0
            for i in range(GROUP):
                now[i] = group[i]
            for i in range(GROUP):
                here, matters = w[n, start + i], weight[start + i]
                mine, levels = now[i], level[i]
                for c in range(CANDIDATES):
                    q = min(max(np.rint(mine[c] * inverse[c]), np.float32(-128)), np.float32(127))
                    miss = mine[c] - q * scale[c]
                    error[c] += matters * miss * miss
                    gone[c] = here - q * scale[c]
                    levels[c] = q
                if i + 1 < GROUP:
                    feed(address_of(gone), address_of(carry[start + i, start:]), address_of(now), i + 1)
            best = 0
            for c in range(1, CANDIDATES):
                if error[c] < error[best]:
                    best = c
            for i in range(GROUP):
                q = level[i, best]
                a.values[n, start + i] = np.int8(q)
                lost[n, start + i] = w[n, start + i] - q * scale[best]
            a.scales[n, start // GROUP] = max(first + best * STEP, 1)
            a.errors[n] += np.float64(error[best])
    # these must live until here, and their addresses alone do not keep them
    gone[0], now[0, 0] = 0, 0


def _try(bits: int) -> Any:
    """try_(group, w, weights, carry, stride, levels, least, largest): the scale, int64, that serves a group best.

    Each scale that plain rounding tries is tried with feedback between the group's columns, so that x is `group` with
    that of the columns before. Leaves the least Σ weights · (x − level · scale)² at `least`, and its levels. At the
    addresses are float32: group, w, weights, levels [GROUP], carry [GROUP, stride] and least. `largest` is the one of
    the group that is largest in magnitude.
    """

    @intrinsic
    def try_(typingctx, group, w, weights, carry, stride, levels, least, largest):  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b, kind = Emitter(builder), builder, vector(FLOAT, LANES)
            group, w, weights, carry, stride, levels, least, largest = args
            room = ir.ArrayType(kind, GROUP)
            now = b.ptrtoint(cgutils.alloca_once(b, room), ir.IntType(64))
            tried = b.ptrtoint(cgutils.alloca_once(b, room), ir.IntType(64))
            width = I64(4 * LANES)

            def at(address: Any, i: Any) -> Any:
                return e.splat(e.load(FLOAT, b.add(address, b.mul(i, I64(4))), align=4), LANES)

            def lay(i: Any, _: list[Any]) -> list[Any]:
                e.store(at(group, i), b.add(now, b.mul(i, width)), align=4)
                return []

            e.loop(I64(0), I64(GROUP), 1, [], lay)
            shares = ir.Constant(kind, [FLOAT(share) for share in shares_of(bits, *_SEARCHED[bits], LANES // 2)])
            scale = stored_scale(e, b.fmul(e.splat(largest, LANES), shares))
            inverse = b.fdiv(e.constant(FLOAT(1), LANES), scale)

            def round_one(i: Any, carried: list[Any]) -> list[Any]:
                x = e.load(kind, b.add(now, b.mul(i, width)), align=4)
                q = nearest_level(e, bits, b.fmul(x, inverse))
                e.store(q, b.add(tried, b.mul(i, width)), align=4)
                stored = b.fmul(q, scale)
                miss, lost = b.fsub(x, stored), b.fsub(at(w, i), stored)
                shares = b.add(carry, b.mul(b.mul(i, stride), I64(4)))

                def add(j: Any, _: list[Any]) -> list[Any]:
                    row = b.add(now, b.mul(j, width))
                    product = b.fmul(lost, at(shares, j), flags=("contract",))
                    e.store(b.fadd(e.load(kind, row, align=4), product, flags=("contract",)), row, align=4)
                    return []

                e.loop(b.add(i, I64(1)), I64(GROUP), 1, [], add)
                squares = b.fmul(b.fmul(miss, miss), at(weights, i), flags=("contract",))
                return [b.fadd(carried[0], squares, flags=("contract",))]

            (total,) = e.loop(I64(0), I64(GROUP), 1, [ir.Constant(kind, None)], round_one)
            lane = first_least(e, total)

            def pick(i: Any, _: list[Any]) -> list[Any]:
                row = e.load(kind, b.add(tried, b.mul(i, width)), align=4)
                e.store(b.extract_element(row, lane), b.add(levels, b.mul(i, I64(4))), align=4)
                return []

            e.loop(I64(0), I64(GROUP), 1, [], pick)
            e.store(b.extract_element(total, lane), least, align=4)
            return b.fptosi(b.extract_element(scale, lane), I64)

        return types.int64(*[types.int64] * 7, types.float32), generate

    return try_


_try4, _try5, _try6 = map(_try, (4, 5, 6))


class PackFeedbackArgs(NamedTuple):
    """As FeedbackArgs with each row divided by its factor, and codes [R, B] of `bits` in place of values."""

    w: F32_2
    x: F32_2
    carry: F32_2
    weight: F32_1
    bits: Int
    codes: U8_2
    scales: I8_2
    lost: F32_2
    errors: F64_1


@kernel(PackFeedbackArgs)
def pack(args: int, part: int, parts: int) -> None:
    """Round each row with feedback."""
    a = unpack(args, PackFeedbackArgs)
    w, x, carry, weight, lost, bits = a.w, a.x, a.carry, a.weight, a.lost, a.bits
    codes = _CODES4 if bits == 4 else _CODES5 if bits == 5 else _CODES6
    group, level = np.empty(GROUP, np.float32), np.empty(GROUP, np.float32)
    least = np.empty(1, np.float32)
    begin, end = span(part, parts, len(w))
    for n in range(begin, end):
        error = np.float64(0)
        for start in range(0, w.shape[1], GROUP):
            gather(group, x[n], lost[n], carry, start)
            largest = np.float32(0)
            for i in range(GROUP):
                if abs(group[i]) > abs(largest):
                    largest = group[i]
            places = (
                address_of(group),
                address_of(w[n, start:]),
                address_of(weight[start:]),
                address_of(carry[start, start:]),
                carry.shape[1],
                address_of(level),
                address_of(least),
            )
            if largest == 0:
                scale, level[:], least[0] = np.int64(0), 0, 0
            elif bits == 4:
                scale = _try4(*places, largest)
            elif bits == 5:
                scale = _try5(*places, largest)
            else:
                scale = _try6(*places, largest)
            a.scales[n, start // GROUP] = scale
            for i in range(GROUP):
                a.codes[n, start + i] = codes[np.int64(level[i]) + 128]
                lost[n, start + i] = w[n, start + i] - level[i] * np.float32(scale)
            error += np.float64(least[0])
        a.errors[n] += error
    # these must live until here, and their addresses alone do not keep them
    group[0], level[0], least[0] = 0, 0, 0


KERNELS: list[Loadable] = [round_, pack]
"""The kernels of `Feedback`, beside those of `quantize_rows` and `pack_rows`."""
