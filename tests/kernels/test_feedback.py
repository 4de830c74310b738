"""Rounding with feedback against GPTQ as its paper writes it, in float64, and against plain rounding."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_cli.kernels.cpu.feedback import Feedback, factorize
from rwkv_cli.kernels.cpu.quantize_packed import pack_rows
from rwkv_cli.kernels.cpu.quantize_weights import quantize_rows
from rwkv_cli.numbers import LEVELS

Floats = NDArray[np.float64]
UNIT = -14


def inputs(tokens: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    """Rows whose columns hang together and are of many sizes, one of them always zero."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, columns)) @ rng.standard_normal((columns, columns))
    mixed *= rng.uniform(0.05, 3, columns)
    mixed[:, 5] = 0
    return mixed.astype(np.float32)


def stored(values: NDArray[np.int8], scales: NDArray[np.uint16], columns: int) -> Floats:
    """The rows that a quantizer's values and scales stand for."""
    wide = np.repeat(scales.view(np.float16).astype(np.float64), 32, axis=1) * 2.0**UNIT
    rows: Floats = (values * wide)[:, :columns]
    return rows


def gptq(w: Floats, h: Floats, scales: Floats, levels: Any = range(-128, 128), *, ordered: bool = True) -> Floats:
    """Algorithm 1 of arXiv 2210.17323, with these levels and scales [N, K/32]: the rounded rows.

    Groups come by the power of their inputs, and so do the columns of each. A group with fewer columns is the last.
    """
    columns, power = w.shape[1], np.diagonal(h) * ordered
    groups = [range(start, min(start + 32, columns)) for start in range(0, columns, 32)]
    groups.sort(key=lambda group: (len(group) < 32, -power[group].sum()))
    order = [k for group in groups for k in (group if len(group) < 32 else sorted(group, key=lambda k: -power[k]))]
    w, q, levels = w[:, order], np.zeros_like(w), np.array(levels, np.float64)
    u = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    for k, place in enumerate(order):
        s = scales[:, place // 32]
        found = levels[np.abs(w[:, k : k + 1] / s[:, None] - levels).argmin(axis=1)] * s
        q[:, place] = found
        w[:, k + 1 :] -= np.outer((w[:, k] - found) / u[k, k], u[k, k + 1 :])
    return q


@pytest.mark.parametrize("columns", [32, 70, 300, 600])
def test_it_is_gptq(columns: int) -> None:
    """With the scales that it chose, nearly every value is the one of the algorithm that inverts XᵀX."""
    x, w = inputs(2000, columns), np.random.default_rng(1).standard_normal((24, columns)).astype(np.float32)
    products = x.T @ x
    feedback = Feedback(products.copy())
    values, scales, squares = feedback.quantize_rows(w, UNIT)
    h = products.astype(np.float64) + float(feedback.damping) * np.eye(columns)
    expected = gptq(w.astype(np.float64), h, scales.view(np.float16).astype(np.float64) * 2.0**UNIT)
    found = stored(values, scales, columns)
    other = np.abs(found - expected) > 1e-6
    assert other.mean() < 0.01  # a value beside a tie may fall on its other side, and those after it follow
    assert squares == pytest.approx(np.square(found - w).sum(), rel=1e-4)
    assert (values[:, columns:] == 0).all()


@pytest.mark.parametrize(("tokens", "columns"), [(2000, 70), (40, 300), (1, 64), (3000, 288)])
def test_no_row_is_worse_than_plain(tokens: int, columns: int) -> None:
    x, w = inputs(tokens, columns).astype(np.float64), np.random.default_rng(2).standard_normal((40, columns))
    w = w.astype(np.float32)
    feedback = Feedback((x.T @ x).astype(np.float32))
    found = stored(*feedback.quantize_rows(w, UNIT)[:2], columns)
    plain = stored(*quantize_rows(w, UNIT)[:2], columns)
    ours, theirs = (np.square((w - q) @ x.T).sum(axis=1) for q in (found, plain))
    assert (ours <= theirs * 1.01).all()
    assert ours.sum() < 0.75 * theirs.sum()
    outputs = np.square(w.astype(np.float64) @ x.T).sum()
    if tokens > 1:  # with one token, λ is nearly all that rounding leaves
        assert feedback.effect == pytest.approx(np.sqrt(ours.sum() / outputs), rel=0.02)


def test_a_column_that_is_never_used_keeps_its_weights() -> None:
    x, w = inputs(2000, 64), np.random.default_rng(3).standard_normal((16, 64)).astype(np.float32)
    found = stored(*Feedback(x.T @ x).quantize_rows(w, UNIT)[:2], 64)
    assert np.abs(found[:, 5] - w[:, 5]).max() < 0.03
    nothing = Feedback(np.zeros((64, 64), np.float32))
    assert np.abs(stored(*nothing.quantize_rows(w, UNIT)[:2], 64) - w).max() < 0.03
    assert nothing.effect == 0


def test_products_are_put_in_order_within_their_own_memory() -> None:
    """What is below the diagonal is not read: sums of products leave it out."""
    columns = 1100
    x = inputs(1300, columns)
    products = (x.T @ x).astype(np.float32)
    half = np.where(np.triu(np.ones_like(products, bool)), products, np.nan)
    tracemalloc.start()
    found = Feedback(half)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 0.8 * products.nbytes, "panels, and no second matrix of this size"
    order = found.order[:columns]
    assert (order != np.arange(columns)).any()
    want = products[np.ix_(order, order)]
    want[np.arange(columns), np.arange(columns)] += found.damping
    factorize(want)
    root = want.diagonal().copy()
    np.testing.assert_array_equal(found.weight, root * root)
    np.testing.assert_array_equal(np.triu(found.carry), np.triu(want / root))


@pytest.mark.parametrize("size", [1, 31, 256, 700])
def test_a_factor_is_upper_triangular(size: int) -> None:
    x = inputs(2 * size + 40, max(size, 6))[:, :size].astype(np.float64)
    h = x.T @ x + np.eye(size)
    root = h.copy()
    factorize(root)
    root = np.triu(root)
    np.testing.assert_allclose(root @ root.T, h, rtol=1e-9, atol=1e-9 * np.abs(h).max())


@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize(("tokens", "columns"), [(2000, 70), (40, 300)])
def test_no_packed_row_is_worse_than_plain(bits: int, tokens: int, columns: int) -> None:
    x, w = inputs(tokens, columns).astype(np.float64), np.random.default_rng(4).standard_normal((40, columns))
    w, feedback = w.astype(np.float32), Feedback((x.T @ x).astype(np.float32))
    first = feedback.order[:32]
    w[3] = w[4, first] = 0
    levels = np.array(LEVELS[bits], np.float64)

    def packed(codes: Any, scales: Any, rows: Any, squares: float) -> Floats:
        by = np.repeat(scales.astype(np.float64) * rows[:, None], 32, axis=1)
        stored: Floats = (levels[codes] * by)[:, :columns]
        assert squares == pytest.approx(np.square(stored - w).sum(), rel=1e-4)
        return stored

    found, plain = packed(*feedback.pack_rows(w, bits)), packed(*pack_rows(w, bits))
    ours, theirs = (np.square((w - q) @ x.T).sum(axis=1) for q in (found, plain))
    assert (ours <= theirs * 1.01).all()
    assert ours.sum() < 0.75 * theirs.sum()
    assert (found[3] == 0).all()
    assert (found[4, first] == 0).all()
    outputs = np.square(w.astype(np.float64) @ x.T).sum()
    assert feedback.effect == pytest.approx(np.sqrt(ours.sum() / outputs), rel=0.02)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_packed_rows_are_gptq_with_scales_that_suit_it(bits: int) -> None:
    """Scales are chosen by what feedback leaves: plain rounding's scales, with the same feedback, leave more."""
    x, w = inputs(2000, 300), np.random.default_rng(5).standard_normal((64, 300)).astype(np.float32)
    products = x.T @ x
    feedback = Feedback(products.copy())
    h = products.astype(np.float64) + float(feedback.damping) * np.eye(300)
    levels = np.array(LEVELS[bits], np.float64)
    codes, scales, rows, _ = feedback.pack_rows(w, bits)
    _, plain_scales, plain_rows, _ = pack_rows(w, bits)
    chosen, plain = scales * rows[:, None].astype(np.float64), plain_scales * plain_rows[:, None].astype(np.float64)
    found = (levels[codes] * np.repeat(chosen, 32, axis=1))[:, :300]
    expected, other = (gptq(w.astype(np.float64), h, by, levels) for by in (chosen, plain))
    ours, same, theirs = (np.einsum("nk,kj,nj", w - q, h, w - q) for q in (found, expected, other))
    assert ours < 1.01 * same  # beside the middle of two levels either is as good, and all after it follow
    assert ours < 0.9 * theirs


def test_inputs_of_much_power_come_first() -> None:
    """The order of columns decides what can be made up for. Inputs in rising order of power are the worst."""
    x, w = inputs(2000, 96), np.random.default_rng(6).standard_normal((64, 96)).astype(np.float32)
    x *= np.linspace(0.1, 10, 96, dtype=np.float32)
    products = x.T @ x
    feedback = Feedback(products.copy())
    values, scales, _ = feedback.quantize_rows(w, UNIT)
    h = products.astype(np.float64) + float(feedback.damping) * np.eye(96)
    wide = scales.view(np.float16).astype(np.float64) * 2.0**UNIT
    as_they_lie = gptq(w.astype(np.float64), h, wide, ordered=False)
    ours, theirs = (np.square((w - q) @ x.T).sum() for q in (stored(values, scales, 96), as_they_lie))
    assert ours < 0.9 * theirs
