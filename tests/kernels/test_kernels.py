"""The CPU's own: rounding, layouts, threads, and what must not depend on where things lie."""

from typing import Any

import numpy as np
import pytest
from lab import Lab, linear, normal, outliers, quantize
from naive import error_ratio

from rwkv_cli.kernels.cpu import elementwise, rounding
from rwkv_cli.kernels.cpu.llvm.levels import IN_FOUR
from rwkv_cli.kernels.cpu.lowering import Lowering
from rwkv_cli.kernels.cpu.products import round_factor
from rwkv_cli.kernels.cpu.steps import Share, Steps
from rwkv_cli.kernels.program import AddLinear, Count, InputMatrix
from rwkv_cli.quant.dtypes import to_float32
from rwkv_cli.quant.formats.int8 import Int8


@pytest.mark.parametrize(("N", "K"), [(16, 32), (40, 70), (256, 64), (320, 33), (5, 5)])
def test_layouts_hold_the_same_numbers(N: int, K: int) -> None:
    w = normal(N, K)
    all_: list[Int8] = [quantize(w, layout) for layout in ("rows", "tile", "columns")]
    for stored in all_:
        np.testing.assert_array_equal(stored.float32(), all_[0].float32())
    # each number is within half a step of its group, whose step is the least that holds the largest, or little more
    stored = all_[0]
    step = np.repeat(to_float32(stored.scales, "F16") * 2.0**stored.unit, 32, axis=1)[:, :K]
    inner = np.abs(stored.values[:, :K]) < 127
    error = np.abs(stored.float32() - w)
    assert (error[inner] <= 0.5001 * step[inner]).all()
    assert (error <= step).all(), "the largest may be cut by a little"
    largest = np.maximum.reduceat(np.abs(w), range(0, K, 32), axis=1)
    assert (to_float32(stored.scales, "F16") * 2.0**stored.unit <= 1.08 * largest / 128).all()


def test_the_search_beats_plain_rounding() -> None:
    """Mean squared error against Q8_0's (absmax/127 rounded to float16), same groups, same bits."""
    w = normal(256, 256)
    parts = w.reshape(-1, 32)
    scale = (np.abs(parts).max(1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    plain = np.rint(parts / scale) * scale
    ours = quantize(w, "rows").float32().reshape(-1, 32)
    assert ((ours - parts) ** 2).mean() < 0.8 * ((plain - parts) ** 2).mean()


def test_exp() -> None:
    x = np.concatenate([np.linspace(-87.3, 88.3, 200_001), [0, -0.0, 1e-30, -1e-8]]).astype(np.float32)
    exp = elementwise.exp
    got = np.array([exp(value) for value in x[::50]])
    np.testing.assert_allclose(got, np.exp(x[::50].astype(np.float64)), rtol=2.5e-7)
    assert elementwise.exp(np.float32(-1e30)) == elementwise.exp(np.float32(-np.inf)) == 0
    assert elementwise.exp(np.float32(np.inf)) == elementwise.exp(np.float32(1e30)) == np.inf
    assert np.isnan(elementwise.exp(np.float32(np.nan)))
    assert elementwise.exp(np.float32(0)) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 1e6])
def test_rounding_weights_of_any_size(scale: float) -> None:
    w = normal(16, 64, scale=scale)
    w[3] = 0
    w[5, :40] *= 1e-6
    stored = quantize(w)
    assert error_ratio(stored.float32() / scale, w / scale) < 0.006
    assert (stored.float32()[3] == 0).all()


@pytest.mark.parametrize("layout", ["tile", "columns"])
def test_what_is_added_onto_is_the_same_bits_too(layout: str) -> None:
    stored, x, onto = quantize(normal(80, 200, scale=0.1), layout), outliers(19, 200), normal(19, 80)
    x[x < 0] = 0

    def added(rows: slice) -> Any:
        lab = Lab()
        total = lab.value(onto[rows])
        lab.ops.add(AddLinear(total, lab.matrix(x[rows]), lab.weight(stored)))
        return lab.run(total)

    each = np.concatenate([added(slice(t, t + 1)) for t in range(19)])
    np.testing.assert_array_equal(added(slice(0, 19)), each)


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (15, 32512)])
def test_activations_keep_their_bits(bits: int, most: int) -> None:
    x = outliers(3, 70)
    low, node = Lowering(2), InputMatrix(Count(3), 70, name="x")
    made = round_factor(low, node, bits)
    views = made.levels, made.factors, made.offsets
    for view in views:
        low.steps.keep(view)
    runnable = low.steps.finish([node])
    runnable.run(2, {"x": x})
    levels, factors, offsets = map(runnable.read, views)
    levels = levels.astype(int)
    in_order = [i & ~3 | IN_FOUR[i & 3] for i in range(32)]
    planes = [levels[:, :, i] if rounding.VNNI else levels[:, :, i, in_order] for i in range(levels.shape[2])]
    total = planes[0] if len(planes) == 1 else planes[0] * 256 + planes[1]
    assert np.abs(total).max() == most
    np.testing.assert_array_equal(offsets, total.sum(-1) * -128)
    back = (total * factors[:, :, None]).reshape(3, 96)
    np.testing.assert_allclose(back[:, :70], x, atol=0.51 * factors.max(), rtol=0)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    for layout in ("tile", "columns"):
        stored, x = quantize(normal(160, 300), layout), outliers(9, 300)
        for rows in (x, x[:1]):
            got = [linear(rows, stored, threads=threads) for threads in (1, 2, 3)]
            np.testing.assert_array_equal(got[0], got[1])
            np.testing.assert_array_equal(got[0], got[2])


def test_where_arrays_lie_does_not_change_the_bits() -> None:
    memory, x, w, b, found = np.zeros(4096, np.float32), normal(1, 40), normal(40), normal(40), set()
    for distance in range(41, 400, 7):
        here, out = memory[:40].reshape(1, 40), memory[distance : distance + 40].reshape(1, 40)
        here[:] = x
        steps = Steps()
        steps.add(elementwise.layer_norm, elementwise.LayerNormArgs(here, w, b, 1e-5, out), Share.fixed(1))
        steps.finish().run(1)
        found.add(out.tobytes())
    assert len(found) == 1
