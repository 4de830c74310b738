"""Rounding with error feedback: what rounding a column loses is made up for by the columns after it (GPTQ).

X [T, K] are inputs of a matrix w [N, K], H = XᵀX + diag(λ), and Δ = w − q is what rounding loses. With R upper
triangular and H = R·Rᵀ, let R = (1 + C)·diag(√d), where C has zeros on and below its diagonal. Then

    Δ·H·Δᵀ = Σ_k d[k] · (x[k] − q[k])²  where  x[k] = w[k] + Σ_{j<k} Δ[j] · C[j, k]

So columns are rounded one after the other, each from x in place of w. (arXiv 2307.13304, section 4, shows that this is
the GPTQ of arXiv 2210.17323, which inverts H.) Inputs of much power come first, which makes Σ d less: whole groups by
their power, and the columns within each. A group's scale is the one of those that plain rounding tries whose sum over
the group is least, with the feedback between the group's own columns.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.cpu.compile import Kernel
from rwkv_cli.kernels.cpu.cores import usable_cores
from rwkv_cli.kernels.cpu.feed import FeedbackArgs, PackFeedbackArgs, pack, round_
from rwkv_cli.kernels.cpu.quantize_packed import pack_rows
from rwkv_cli.kernels.cpu.quantize_weights import quantize_rows
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

Floats32 = NDArray[np.float32]


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
        """`products` is XᵀX [K, K], of which only what is on and above the diagonal is read. It becomes the factor."""
        K = len(products)
        self.order = _order(products.diagonal())
        """The columns in the order of rounding, those of padding included."""
        _reorder(products, self.order[:K])
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
        """The result of `quantize_rows`, rounded with feedback. A row that plain rounding hurts less stays plain."""
        by = np.float32(2.0**-unit)
        w = np.ascontiguousarray(w * by)
        values, scales = np.zeros((len(w), _padded(w)), np.int8), np.zeros((len(w), _padded(w) // GROUP), np.uint16)

        def each(part: slice, groups: slice, block: _Block) -> None:
            out, factors = np.empty(block.w.shape, np.int8), np.empty(_in_groups(block.w), np.uint16)
            _run(round_, FeedbackArgs(**block._asdict(), values=out, scales=factors))
            values[:, self.order[part]], scales[:, self._group_order[groups]] = out, factors

        lost, errors = self._rounded(w, each)
        plain = quantize_rows(w, 0)[:2]
        plain_lost = w - _dequantized(*plain)[:, : w.shape[1]]
        squares = self._keep_better(w, (lost, errors), plain_lost, (values, scales), plain)
        return values, scales, squares / float(by) ** 2

    def pack_rows(
        self, w: Floats32, bits: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.float32], float]:
        """The result of `pack_rows`, rounded with feedback. A row that plain rounding hurts less stays plain."""
        w = np.ascontiguousarray(w)
        levels = np.array(LEVELS[bits], np.float32)
        rows = np.abs(w).max(axis=1) * np.float32(_ROOM) / (levels[-1] * np.float32(127))
        by = np.divide(1, rows, out=np.zeros_like(rows), where=rows > 0)[:, None]
        codes, scales = np.zeros((len(w), _padded(w)), np.uint8), np.zeros((len(w), _padded(w) // GROUP), np.int8)

        def each(part: slice, groups: slice, block: _Block) -> None:
            out, factors = np.empty(block.w.shape, np.uint8), np.empty(_in_groups(block.w), np.int8)
            _run(pack, PackFeedbackArgs(**block._asdict(), bits=bits, codes=out, scales=factors))
            codes[:, self.order[part]], scales[:, self._group_order[groups]] = out, factors

        lost, errors = self._rounded(w * by, each)
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
        self, w: Floats32, each: Callable[[slice, slice, _Block], object]
    ) -> tuple[Floats32, NDArray[np.float64]]:
        """Δ and Σ d·(x − q)² of rows [R, K]. `each` rounds some columns, whose places and groups' places it gets."""
        K, padded = w.shape[1], _padded(w)
        w = np.take(w, self.order[:K], axis=1)
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
            each(slice(start, end), slice(start // GROUP, end // GROUP), block)
            lost[:, start:end] = block.lost
        placed = np.empty_like(w)
        placed[:, self.order[:K]] = lost[:, :K]
        return placed, errors

    @property
    def _group_order(self) -> NDArray[np.intp]:
        """The groups in the order of rounding."""
        groups: NDArray[np.intp] = self.order[::GROUP] // GROUP
        return groups

    def _effects(self, rows: Floats32) -> NDArray[np.float64]:
        """Σ_t (row · x[t])² of each row."""
        ordered = np.take(rows, self.order[: rows.shape[1]], axis=1)
        total: NDArray[np.float64] = np.zeros(len(rows))
        for start, stop in _blocks(rows.shape[1]):
            x = ordered[:, start:stop] + ordered[:, :start] @ self.carry[:start, start:stop]
            x += ordered[:, start:stop] @ np.triu(self.carry[start:stop, start:stop], 1)
            total += np.square(x, dtype=np.float64) @ self.weight[start:stop].astype(np.float64)
        undamped: NDArray[np.float64] = np.maximum(total - self._damped(rows), 0)
        return undamped

    def _damped(self, rows: Floats32) -> NDArray[np.float64]:
        """The part of a sum that comes of λ."""
        squares: NDArray[np.float64] = np.square(rows, dtype=np.float64).sum(axis=1)
        return float(self.damping) * squares


def _order(power: Floats32) -> NDArray[np.intp]:
    """Columns of this power by groups: those of the most first, and so are the columns of each. Padding comes last."""
    whole = len(power) // GROUP * GROUP
    groups = power[:whole].reshape(-1, GROUP)
    columns = np.argsort(-groups, axis=1, kind="stable") + np.arange(0, whole, GROUP)[:, None]
    rest = np.arange(whole, -(-len(power) // GROUP) * GROUP)
    first: NDArray[np.intp] = columns[np.argsort(-groups.sum(axis=1), kind="stable")].reshape(-1)
    return np.concatenate([first, rest])


def _reorder(h: NDArray[Any], order: NDArray[np.intp]) -> None:
    """Bring a symmetric h, of which what is below its diagonal is not read, into this order of rows and of columns.

    Panels of it are copied, so that no second matrix of its size exists.
    """
    panels = [slice(start, stop) for start, stop in _blocks(len(h))]
    for panel in panels:
        corner = np.triu(h[panel, panel])
        h[panel, panel] = corner + np.triu(corner, 1).T
        h[panel.stop :, panel] = h[panel, panel.stop :].T
    for panel in panels:
        h[panel] = h[panel, order]
    for panel in panels:
        h[:, panel] = h[order, panel]


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


def _in_groups(w: Floats32) -> tuple[int, int]:
    """The shape of the scales of w, whose columns are whole groups."""
    return len(w), w.shape[1] // GROUP


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
