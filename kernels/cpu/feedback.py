"""Rounding with error feedback: what rounding a column loses is made up for by the columns after it (GPTQ).

X [T, K] are inputs of a matrix w [N, K], H = XᵀX + diag(λ), and Δ = w − q is what rounding loses. With R upper
triangular and H = R·Rᵀ, let R = (1 + C)·diag(√d), where C has zeros on and below its diagonal. Then

    Δ·H·Δᵀ = Σ_k d[k] · (x[k] − q[k])²  where  x[k] = w[k] + Σ_{j<k} Δ[j] · C[j, k]

So columns are rounded one after the other, each from x in place of w. (arXiv 2307.13304, section 4, shows that this is
the GPTQ of arXiv 2210.17323, which inverts H.) A group's scale is the one of those that plain rounding tries whose
sum over the group is least, with the feedback between the group's own columns.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import Loadable
from rwkv_cli.kernels.cpu.args import F32_1, F32_2, F64_1, I8_2, U8_2, U16_2, Int, unpack
from rwkv_cli.kernels.cpu.compile import Kernel, kernel
from rwkv_cli.kernels.cpu.cores import usable_cores
from rwkv_cli.kernels.cpu.elementwise import address_of, span
from rwkv_cli.kernels.cpu.llvm.bits import bits_of, float_of
from rwkv_cli.kernels.cpu.llvm.emitter import F32 as FLOAT
from rwkv_cli.kernels.cpu.llvm.emitter import I64, Emitter, vector
from rwkv_cli.kernels.cpu.quantize_packed import LANES, first_least, nearest_level, pack_rows, scales_tried
from rwkv_cli.kernels.cpu.quantize_weights import CANDIDATES, STEP, quantize_rows
from rwkv_cli.kernels.cpu.steps import Share, Steps
from rwkv_cli.numbers import GROUP, LEVELS

_BLOCK = 256
"""Columns whose feedback on each other the kernel computes. That of earlier blocks is one matrix product."""
_DAMPING = 0.01
"""λ as a share of the mean of XᵀX's diagonal (arXiv 2210.17323, section 3.3)."""
_ROOM = 1.05
"""Room in a row's factor for weights that feedback makes larger than the largest one."""
_SAMPLED = 64
"""Rows of a block that tell how large the outputs of a matrix are."""


def _codes(bits: int) -> NDArray[np.uint8]:
    """The code of each level, at its place from −128 on."""
    codes = np.zeros(256, np.uint8)
    codes[np.array(LEVELS[bits]) + 128] = np.arange(len(LEVELS[bits]))
    return codes


_CODES4, _CODES5, _CODES6 = map(_codes, (4, 5, 6))

Floats32 = NDArray[np.float32]


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


@kernel(FeedbackArgs)
def _round(args: int, part: int, parts: int) -> None:
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
            for i in range(GROUP):
                group[i] = x[n, start + i]
            for k in range(start):
                for i in range(GROUP):
                    group[i] += lost[n, k] * carry[k, start + i]
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
            scale = scales_tried(e, bits, largest)
            inverse = b.fdiv(e.constant(FLOAT(1), LANES), scale)

            def round_(i: Any, carried: list[Any]) -> list[Any]:
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

            (total,) = e.loop(I64(0), I64(GROUP), 1, [ir.Constant(kind, None)], round_)
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
def _pack(args: int, part: int, parts: int) -> None:
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
            for i in range(GROUP):
                group[i] = x[n, start + i]
            for k in range(start):
                for i in range(GROUP):
                    group[i] += lost[n, k] * carry[k, start + i]
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


KERNELS: list[Loadable] = [_round, _pack]
"""The kernels of `Feedback`, beside those of `quantize_rows` and `pack_rows`."""


class _Block(NamedTuple):
    """Some columns of rows in work: what FeedbackArgs and PackFeedbackArgs have in common."""

    w: Floats32
    x: Floats32
    carry: Floats32
    weight: Floats32
    lost: Floats32
    errors: NDArray[np.float64]


class Feedback:
    """The rounding of one matrix, bound to what it multiplies."""

    def __init__(self, products: Floats32) -> None:
        """`products` is XᵀX [K, K], of which this makes C in place."""
        K = len(products)
        mean = float(products.diagonal().mean())
        self.damping = np.float32(_DAMPING * mean if mean > 0 else 1)
        products[np.arange(K), np.arange(K)] += self.damping
        factorize(products)
        root = products.diagonal().copy()
        products /= root
        self.carry, self.weight = products, root * root
        self.error, self.energy = 0.0, 0.0
        """Σ (Δ·x)² and Σ (w·x)² over the rows so far and all inputs x, for `effect`."""

    def quantize_rows(self, w: Floats32, unit: int) -> tuple[NDArray[np.int8], NDArray[np.uint16], float]:
        """What `quantize_rows` gives, rounded with feedback. A row that plain rounding hurts less stays plain."""
        by = np.float32(2.0**-unit)
        w = np.ascontiguousarray(w * by)
        values, scales = np.zeros((len(w), _padded(w)), np.int8), np.zeros((len(w), _padded(w) // GROUP), np.uint16)

        def round_(part: slice, groups: slice, block: _Block) -> None:
            out, factors = values[:, part].copy(), scales[:, groups].copy()
            _run(_round, FeedbackArgs(**block._asdict(), values=out, scales=factors))
            values[:, part], scales[:, groups] = out, factors

        lost, errors = self._rounded(w, round_)
        plain = quantize_rows(w, 0)[:2]
        plain_lost = w - _dequantized(*plain)[:, : w.shape[1]]
        squares = self._keep_better(w, (lost, errors), plain_lost, (values, scales), plain)
        return values, scales, squares / float(by) ** 2

    def pack_rows(
        self, w: Floats32, bits: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.float32], float]:
        """What `pack_rows` gives, rounded with feedback. A row that plain rounding hurts less stays plain."""
        w = np.ascontiguousarray(w)
        levels = np.array(LEVELS[bits], np.float32)
        rows = np.abs(w).max(axis=1) * np.float32(_ROOM) / (levels[-1] * np.float32(127))
        by = np.divide(1, rows, out=np.zeros_like(rows), where=rows > 0)[:, None]
        codes, scales = np.zeros((len(w), _padded(w)), np.uint8), np.zeros((len(w), _padded(w) // GROUP), np.int8)

        def round_(part: slice, groups: slice, block: _Block) -> None:
            out, factors = codes[:, part].copy(), scales[:, groups].copy()
            _run(_pack, PackFeedbackArgs(**block._asdict(), bits=bits, codes=out, scales=factors))
            codes[:, part], scales[:, groups] = out, factors

        lost, errors = self._rounded(w * by, round_)
        lost *= rows[:, None]
        errors *= np.square(rows.astype(np.float64))
        plain_codes, plain_scales, plain_rows, _ = pack_rows(w, bits)
        plain = plain_codes, plain_scales, plain_rows
        by = plain_scales.astype(np.float32) * plain_rows[:, None]
        stored = levels[plain_codes] * np.repeat(by, GROUP, axis=1)
        squares = self._keep_better(w, (lost, errors), w - stored[:, : w.shape[1]], (codes, scales, rows), plain)
        return codes, scales, rows, squares

    def _keep_better(
        self,
        w: Floats32,
        found: tuple[Floats32, NDArray[np.float64]],
        plain_lost: Floats32,
        arrays: Sequence[NDArray[Any]],
        plain: Sequence[NDArray[Any]],
    ) -> float:
        """Put plain rounding's arrays in place where its error is less. Returns the squared error of the rows."""
        lost, errors = found
        errors = errors - self._damped(lost)
        plain_errors = self._effects(plain_lost)
        worse = errors > plain_errors
        lost[worse] = plain_lost[worse]
        for array, other in zip(arrays, plain, strict=True):
            array[worse] = other[worse]
        self.error += float(np.minimum(errors, plain_errors).sum())
        self.energy += float(self._effects(w[:: max(1, len(w) // _SAMPLED)]).mean()) * len(w)
        return float(np.vdot(lost, lost))

    @property
    def effect(self) -> float:
        """The relative error of the outputs."""
        return float(np.sqrt(max(self.error, 0.0) / self.energy)) if self.energy > 0 else 0.0

    def _rounded(
        self, w: Floats32, round_: Callable[[slice, slice, _Block], object]
    ) -> tuple[Floats32, NDArray[np.float64]]:
        """Δ and Σ d·(x − q)² of rows [R, K]. `round_` rounds some columns, whose places and groups' places it gets."""
        K, padded = w.shape[1], _padded(w)
        lost, errors = np.zeros((len(w), padded), np.float32), np.zeros(len(w))
        for start, stop in _blocks(K):
            end = min(start + _BLOCK, padded)
            before = w[:, start:stop]
            more = (0, end - stop)
            block = _Block(
                w=np.pad(before, ((0, 0), more)),
                x=np.pad(before + lost[:, :start] @ self.carry[:start, start:stop], ((0, 0), more)),
                carry=np.pad(np.triu(self.carry[start:stop, start:stop], 1), (more, more)),
                weight=np.pad(self.weight[start:stop], more),
                lost=np.empty((len(w), end - start), np.float32),
                errors=errors,
            )
            round_(slice(start, end), slice(start // GROUP, end // GROUP), block)
            lost[:, start:end] = block.lost
        return np.ascontiguousarray(lost[:, :K]), errors

    def _effects(self, rows: Floats32) -> NDArray[np.float64]:
        """Σ_t (row · x[t])² of each row."""
        total: NDArray[np.float64] = np.zeros(len(rows))
        for start, stop in _blocks(rows.shape[1]):
            x = rows[:, start:stop] + rows[:, :start] @ self.carry[:start, start:stop]
            x += rows[:, start:stop] @ np.triu(self.carry[start:stop, start:stop], 1)
            total += np.square(x, dtype=np.float64) @ self.weight[start:stop].astype(np.float64)
        undamped: NDArray[np.float64] = np.maximum(total - self._damped(rows), 0)
        return undamped

    def _damped(self, rows: Floats32) -> NDArray[np.float64]:
        """The part of a sum that comes of λ."""
        squares: NDArray[np.float64] = np.square(rows, dtype=np.float64).sum(axis=1)
        return float(self.damping) * squares


def factorize(h: NDArray[Any]) -> None:
    """Replace a symmetric, positive definite h by the upper triangular R with h = R·Rᵀ. What is below is left over.

    Panels of columns are taken from the last to the first, so that no step is long.
    """
    for start, stop in reversed(_blocks(len(h))):
        corner = h[start:stop, start:stop].astype(np.float64)
        corner = np.triu(corner) + np.triu(corner, 1).T
        root = np.linalg.cholesky(corner[::-1, ::-1])[::-1, ::-1]
        h[start:stop, start:stop] = root
        above = h[:start, start:stop] @ np.linalg.inv(root).T.astype(h.dtype)
        h[:start, start:stop] = above
        for left, right in _blocks(start):
            h[:right, left:right] -= above[:right] @ above[left:right].T


def _run(kernel: Kernel, record: NamedTuple) -> None:
    """Run a kernel over the rows of its errors."""
    threads, steps = usable_cores().physical, Steps()
    rows = len(record.errors)  # type: ignore[attr-defined]
    steps.add(kernel, record, Share.fixed(min(rows, 8 * threads)))
    steps.finish().run(threads)


def _padded(w: Floats32) -> int:
    """The columns of w in whole groups."""
    _, K = w.shape
    return int(-(-K // GROUP) * GROUP)


def _blocks(columns: int) -> list[tuple[int, int]]:
    """First column and end of each block."""
    return [(start, min(start + _BLOCK, columns)) for start in range(0, columns, _BLOCK)]


def _dequantized(values: NDArray[np.int8], scales: NDArray[np.uint16]) -> Floats32:
    """The rows that int8 values and float16 scales stand for, in the tensor's unit."""
    groups = values.reshape(len(values), -1, GROUP) * scales.view(np.float16).astype(np.float32)[:, :, None]
    return groups.reshape(len(values), -1)
