"""Rounding with error feedback: what rounding a column loses is made up for by the columns after it (GPTQ).

X [T, K] are inputs of a matrix w [N, K], H = XᵀX + diag(λ), and Δ = w − q is what rounding loses. With R upper
triangular and H = R·Rᵀ, let R = (1 + C)·diag(√d), where C has zeros on and below its diagonal. Then

    Δ·H·Δᵀ = Σ_k d[k] · (x[k] − q[k])²  where  x[k] = w[k] + Σ_{j<k} Δ[j] · C[j, k]

So columns are rounded one after the other, each from x in place of w. (arXiv 2307.13304, section 4, shows that this is
the GPTQ of arXiv 2210.17323, which inverts H.) A group's scale is the one of `quantize_weights`' candidates whose sum
over the group is least, with the feedback between the group's own columns.
"""

from typing import Any, NamedTuple

import numpy as np
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import Loadable
from rwkv_cli.kernels.cpu.args import F32_1, F32_2, F64_1, I8_2, U16_2, unpack
from rwkv_cli.kernels.cpu.compile import kernel
from rwkv_cli.kernels.cpu.cores import usable_cores
from rwkv_cli.kernels.cpu.elementwise import address_of, span
from rwkv_cli.kernels.cpu.llvm.bits import bits_of, float_of
from rwkv_cli.kernels.cpu.llvm.emitter import F32 as FLOAT
from rwkv_cli.kernels.cpu.llvm.emitter import I64, Emitter, vector
from rwkv_cli.kernels.cpu.quantize_weights import CANDIDATES, STEP, quantize_rows
from rwkv_cli.kernels.cpu.steps import Share, Steps
from rwkv_cli.numbers import GROUP

_BLOCK = 256
"""Columns whose feedback on each other the kernel computes. That of earlier blocks is one matrix product."""
_DAMPING = 0.01
"""λ as a share of the mean of XᵀX's diagonal (arXiv 2210.17323, section 3.3)."""
_SAMPLED = 64
"""Rows of a block that tell how large the outputs of a matrix are."""

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


KERNELS: list[Loadable] = [_round]
"""The kernels of `Feedback`, beside those of `quantize_rows`."""


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

    def __call__(self, w: Floats32, unit: int) -> tuple[NDArray[np.int8], NDArray[np.uint16], float]:
        """What `quantize_rows` gives, rounded with feedback. A row that plain rounding hurts less stays plain."""
        by = np.float32(2.0**-unit)
        w = np.ascontiguousarray(w * by)
        values, scales, lost, errors = self._rounded(w)
        errors -= self._damped(lost)
        plain_values, plain_scales, _ = quantize_rows(w, 0)
        plain_lost = w - _dequantized(plain_values, plain_scales)[:, : w.shape[1]]
        plain_errors = self._effects(plain_lost)
        worse = errors > plain_errors
        values[worse], scales[worse], lost[worse] = plain_values[worse], plain_scales[worse], plain_lost[worse]
        self.error += float(np.minimum(errors, plain_errors).sum()) / float(by) ** 2
        self.energy += float(self._effects(w[:: max(1, len(w) // _SAMPLED)]).mean()) * len(w) / float(by) ** 2
        return values, scales, float(np.vdot(lost, lost)) / float(by) ** 2

    @property
    def effect(self) -> float:
        """The relative error of the outputs."""
        return float(np.sqrt(max(self.error, 0.0) / self.energy)) if self.energy > 0 else 0.0

    def _rounded(self, w: Floats32) -> tuple[NDArray[np.int8], NDArray[np.uint16], Floats32, NDArray[np.float64]]:
        """Values, scales, Δ and Σ d·(x − q)² of rows [R, K]."""
        (R, K), threads = w.shape, usable_cores().physical
        values = np.zeros((R, -(-K // GROUP) * GROUP), np.int8)
        scales = np.zeros((R, -(-K // GROUP)), np.uint16)
        lost, errors = np.empty_like(w), np.zeros(R)
        for start, stop in _blocks(K):
            padded = -(-stop // GROUP) * GROUP
            before = w[:, start:stop]
            x = before + lost[:, :start] @ self.carry[:start, start:stop]
            more = ((0, 0), (0, padded - stop))
            record = FeedbackArgs(
                w=np.pad(before, more),
                x=np.pad(x, more),
                carry=np.pad(np.triu(self.carry[start:stop, start:stop], 1), (more[1], more[1])),
                weight=np.pad(self.weight[start:stop], more[1]),
                values=np.empty((R, padded - start), np.int8),
                scales=np.empty((R, (padded - start) // GROUP), np.uint16),
                lost=np.empty((R, padded - start), np.float32),
                errors=errors,
            )
            steps = Steps()
            steps.add(_round, record, Share.fixed(min(R, 8 * threads)))
            steps.finish().run(threads)
            values[:, start:padded] = record.values
            scales[:, start // GROUP : padded // GROUP] = record.scales
            lost[:, start:stop] = record.lost[:, : stop - start]
        return values, scales, lost, errors

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


def _blocks(columns: int) -> list[tuple[int, int]]:
    """First column and end of each block."""
    return [(start, min(start + _BLOCK, columns)) for start in range(0, columns, _BLOCK)]


def _dequantized(values: NDArray[np.int8], scales: NDArray[np.uint16]) -> Floats32:
    """The rows that int8 values and float16 scales stand for, in the tensor's unit."""
    groups = values.reshape(len(values), -1, GROUP) * scales.view(np.float16).astype(np.float32)[:, :, None]
    return groups.reshape(len(values), -1)
