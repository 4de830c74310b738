"""The GPU's own ways to compute: many products in one launch, levels made beside values."""

import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import naive
import numpy as np
import pytest
import tiny
from lab import RNG, Lab, guarded_gpu, in_float16, linear, lone_arrays, normal, parts, quantize
from naive import error_ratio, sigmoid

from rwkv_cli.kernels import program as p
from rwkv_cli.quant.formats import Floats

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (rwkv-cli[cuda])", allow_module_level=True)

from rwkv_cli.kernels.cuda import backend as cuda
from rwkv_cli.kernels.cuda.array import DeviceArray
from rwkv_cli.kernels.cuda.device import norms

pytestmark = [
    # Floats of the simulator are numpy's, which warns where a GPU goes on.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with guarded_gpu(monkeypatch):
        yield


def uniform(low: float, high: float, *shape: int) -> Any:
    return RNG.uniform(low, high, shape).astype(np.float32)


def check(got: Any, want: Any, limit: float = 2e-6) -> None:
    assert error_ratio(got, want) < limit
    assert np.abs(got - want).max() < 20 * limit * max(1.0, np.abs(want).max())


def run(lab: Lab, *outputs: p.Value) -> list[Any]:
    """Run a program with bands around all its arrays, and again with its memory as it is planned."""
    before = {name: a.copy() if isinstance(a, DeviceArray) else a for name, a in lab.arrays.items()}
    with pytest.MonkeyPatch.context() as patch:
        lone_arrays(patch)
        alone = lab.run_all(*outputs)
    after, lab.arrays = lab.arrays, before
    results = lab.run_all(*outputs)
    for one, other in zip([*alone, *after.values()], [*results, *lab.arrays.values()], strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    return results


def stored(w: Any, layout: str) -> tuple[Any, Any]:
    """A weight on the device and the matrix that it stands for."""
    q = quantize(w, layout)
    return cuda.weight(q), q.float32().astype(float)


@pytest.mark.parametrize("T", [1, 3, 10, 35])
def test_products(T: int) -> None:
    """Several at once: int8 and codes, ragged sizes, a shared and two mixed inputs, every activation, biases."""
    K, lab = 70, Lab("cuda")
    x, delta, row, mix, bias = normal(T, K), normal(T, K), uniform(0, 1, 1, K), uniform(0, 1, T, K), normal(1, 17)
    (a, wa), (b, wb), (c, wc), (d, wd), (e, we) = (
        stored(normal(17, K), "tile"),
        stored(normal(48, K), "columns"),
        stored(normal(5, K, scale=0.1), "tile6"),  # tanh is not at its ends
        stored(normal(17, 48, scale=1e-3), "tile4"),
        stored(normal(19, K, scale=0.1), "tile4"),
    )
    dx, dd, dm, offset = lab.matrix(x), lab.matrix(delta), lab.matrix(mix), lab.vector(bias)
    one = p.Lerp(dx, dd, lab.vector(row))
    outs = lab.ops.linear(
        p.Product(dx, a, "sigmoid", offset),
        p.Product(dx, b),
        p.Product(one, c, "tanh"),
        p.Product(one, a, "silu"),
        p.Product(p.Lerp(dx, dd, dm), a, "relu_squared"),
        p.Product(dx, a, "decay"),
        p.Product(dx, a, "soft_decay", offset),
        p.Product(one, e),  # of the same mix as two before, which it reads in 8 bits
    )
    first, second, *_ = outs
    lab.ops.add(p.AddLinear(first, second, d))

    x, lerped = x.astype(float), x + delta.astype(float) * row
    product, coarse = x @ wa.T, naive.rounded(x, 8) @ wb.T
    want = [
        sigmoid(product + bias) + coarse @ wd.T,
        coarse,
        np.tanh(lerped @ wc.T),
        lerped @ wa.T * sigmoid(lerped @ wa.T),
        np.maximum((x + delta.astype(float) * mix) @ wa.T, 0) ** 2,
        np.exp(-np.exp(product)),
        np.exp(-np.exp(-0.5) * sigmoid(product + bias)),
        naive.rounded(lerped, 8) @ we.T,
    ]
    for have, expected in zip(run(lab, *outs), want, strict=True):
        check(have, expected, 1e-4)  # 15 bits of activation


@pytest.mark.parametrize("layout", ["tile", "tile5"])
def test_many_tokens_of_any_size(layout: str) -> None:
    """Each token has a factor of its own, so that none is too large or too small for float16."""
    x, q = normal(65, 70), quantize(normal(20, 70), layout)
    x *= np.float32([[1e30], [1e-25], [1e5], [65504], [0]] * 13)
    x[7, 3] = 1e9  # beside which others are nothing
    for row, want in zip(linear(x, q, device="cuda"), in_float16(x, q), strict=True):
        assert np.abs(row - want).max() <= 1e-5 * np.abs(want).max()


def test_many_tokens_of_products_of_any_size() -> None:
    """Several at once, of one to six groups of columns, with biases and activations; then one that adds."""
    T, lab, want, asked = 65, Lab("cuda"), [], []
    for (N, K), activation in zip(((5, 7), (140, 40), (33, 170)), ("", "relu_squared", "tanh"), strict=True):
        x, q, bias = normal(T, K), quantize(normal(N, K, scale=0.1), "tile"), normal(1, N)
        asked.append(p.Product(lab.matrix(x), lab.weight(q), activation, lab.vector(bias)))
        total = in_float16(x, q) + bias
        want.append({"": total, "relu_squared": np.maximum(total, 0) ** 2, "tanh": np.tanh(total)}[activation])
    outs = lab.ops.linear(*asked)
    onto, x, q = normal(T, 140), normal(T, 40), quantize(normal(140, 40), "tile")
    added = lab.value(onto)
    lab.ops.add(p.AddLinear(added, lab.matrix(x), lab.weight(q)))
    for got, right in zip(run(lab, *outs, added), [*want, onto + in_float16(x, q)], strict=True):
        check(got, right, 1e-5)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_token_has_the_same_bits_beside_others_of_a_form(quantized: bool) -> None:
    """The form of a kernel depends on how many tokens there are. Within one, a token's sums do not."""
    x, results = normal(7, 70), []
    w, _ = stored(normal(20, 70), "tile") if quantized else floats(normal(20, 70), "F16")
    for rows in (x[:2], x, x[::-1]):
        lab = Lab("cuda")
        (out,) = lab.ops.linear(p.Product(lab.matrix(rows), w))
        results.append(lab.run(out))
    few, many, turned = results
    np.testing.assert_array_equal(few, many[:2])
    np.testing.assert_array_equal(turned[::-1], many)


def floats(values: Any, dtype: str) -> tuple[Any, Any]:
    """A float weight on the device and the matrix that it stands for."""
    (rounded,) = tiny.rounded({"": values}, dtype).values()
    bits = np.frombuffer(tiny.raw(rounded, dtype), "<f4" if dtype == "F32" else "<u2").reshape(values.shape)
    return cuda.weight(Floats("float", dtype, bits)), rounded


@pytest.mark.parametrize("lengths", [(1,), (2, 0, 3), (17, 1), (60, 6)])
def test_a_norm_and_shift_round_their_mixes(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader gets the same numbers as from a launch that rounds, with the work of a row spread and not."""
    monkeypatch.setattr(norms, "_MOST_THREADS", 32)  # a thread has several columns
    T, B, D, lab = sum(lengths), len(lengths), 90, Lab("cuda")
    x, last, weight, bias, mix = normal(T, D), normal(B, D), normal(1, D), normal(1, D), uniform(0, 1, 1, D)
    w, full = stored(normal(20, D), "tile")
    ops, state = lab.ops, lab.state(last)
    a = ops.add(p.LayerNorm(lab.matrix(x), p.Norm(lab.vector(weight), lab.vector(bias), 1e-5)))
    delta = ops.add(p.TokenShift(a, lab.starts(lengths), state))
    mixed = p.Lerp(a, delta, lab.vector(mix))
    joined = ops.linear(p.Product(mixed, w), p.Product(a, w))
    same = p.Lerp(a, delta, lab.matrix(np.tile(mix, (T, 1))))
    alone = ops.linear(p.Product(same, w), p.Product(p.Columns(a, 0, D), w))
    *got, of_a, of_delta = run(lab, *joined, *alone, a, delta)
    np.testing.assert_array_equal(got[:2], got[2:])
    normed = naive.layer_norm(x.astype(float), weight[0], bias[0], 1e-5)
    check(of_a, normed)
    for b, rows in parts(lengths).items():
        check(of_delta[rows], np.vstack([last[b : b + 1], normed[rows][:-1]]) - normed[rows])
        check(lab.state_after(state)[b], normed[rows][-1])
    check(got[0], (of_a.astype(float) + of_delta * mix.astype(float)) @ full.T, 1e-4 if T <= 64 else 1e-3)


@pytest.mark.parametrize("T", [1, 3, 18])
def test_float_products(T: int) -> None:
    """Several at once, of two types: a shared and a mixed input, a bias; then one that adds."""
    K, lab = 37, Lab("cuda")
    x, delta, mix, bias = normal(T, K), normal(T, K), uniform(0, 1, 1, K), normal(1, 70)
    (a, wa), (b, wb), (c, wc), (d, wd) = (
        floats(normal(N, columns), dtype)
        for N, columns, dtype in ((70, K, "F16"), (9, K, "F16"), (5, K, "BF16"), (70, 9, "F32"))
    )
    dx, lerp = lab.matrix(x), p.Lerp(lab.matrix(x), lab.matrix(delta), lab.vector(mix))
    outs = lab.ops.linear(p.Product(dx, a, "silu", lab.vector(bias)), p.Product(lerp, b), p.Product(lerp, c, "tanh"))
    first, second, *_ = outs
    lab.ops.add(p.AddLinear(first, second, d))
    x, lerped = x.astype(float), x + delta.astype(float) * mix
    wanted = [
        (x @ wa.T + bias) * sigmoid(x @ wa.T + bias) + lerped @ wb.T @ wd.T,
        lerped @ wb.T,
        np.tanh(lerped @ wc.T),
    ]
    for got, want in zip(run(lab, *outs), wanted, strict=True):
        check(got, want, 1e-5)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_float_product_with_one_token_reads_a_long_row(dtype: str) -> None:
    """A lane has several loads under way, then what is left, and more columns than shared memory at a time."""
    K, lab = 2090, Lab("cuda")
    x, (w, full) = normal(1, K), floats(normal(3, K, scale=0.1), dtype)
    (out,) = lab.ops.linear(p.Product(lab.matrix(x), w))
    check(lab.run(out), x.astype(float) @ full.T, 1e-5)


def test_gates_and_ranges_of_columns() -> None:
    x, y, gate, lab = normal(3, 37), normal(3, 37), normal(3, 37), Lab("cuda")
    ones, zeros = np.ones(37), np.zeros(37)
    want = naive.layer_norm(x.astype(float), ones, zeros, 1e-5) + y.astype(float) * gate
    (w, full), (fw, plain) = stored(normal(16, 12), "tile"), floats(normal(5, 12), "F32")
    both = lab.matrix(y)
    out = lab.ops.add(p.LayerNorm(lab.matrix(x), p.Norm(lab.vector(ones), lab.vector(zeros), 1e-5)))
    lab.ops.add(p.AddGated(out, both, lab.matrix(gate)))
    ranges = [p.Columns(both, first, 12) for first in (0, 12, 24)]
    _, middle, _ = ranges
    products = lab.ops.linear(*(p.Product(each, w) for each in ranges), p.Product(middle, fw))
    got, *products, last = run(lab, out, *products)
    check(got, want)
    for part, product in zip(np.split(y[:, :36], 3, axis=1), products, strict=True):
        check(product, part @ full.T, 1e-4)
    check(last, y[:, 12:24] @ plain.T.astype(float))


def test_threads_that_come_at_once_share_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """In numba's simulator each thread of a block asks for shared memory. Here all ask before the first one has it."""
    monkeypatch.undo()  # greenlets come one by one
    make = np.empty
    monkeypatch.setattr(np, "empty", lambda *args, **named: (time.sleep(2e-3), make(*args, **named))[1])
    x, lab = normal(2, 64), Lab("cuda")
    ones, zeros = np.ones(64), np.zeros(64)
    out = lab.ops.add(p.LayerNorm(lab.matrix(x), p.Norm(lab.vector(ones), lab.vector(zeros), 1e-5)))
    check(lab.run(out), naive.layer_norm(x.astype(float), ones, zeros, 1e-5))


@pytest.mark.parametrize("lengths", [(1,), (3,), (6,), (4,) * 17, (66,)])
def test_levels_are_put_by_who_makes_an_activation(lengths: tuple[int, ...]) -> None:
    """A reader gets the same numbers as from a launch that rounds. A value that was changed is rounded again."""
    T, B, (H, N), K, lab = sum(lengths), len(lengths), (2, 32), 64, Lab("cuda")
    r, k, v, x = (normal(T, K) for _ in range(4))
    (a, wa), (b, wb) = stored(normal(40, K), "tile"), stored(normal(17, 40), "tile")
    wkv = p.Wkv6(
        receptance=lab.matrix(r),
        key=lab.matrix(k),
        value=lab.matrix(v),
        decay=lab.vector(uniform(0.5, 1, 1, K)),
        bonus=lab.vector(normal(H, N)),
        norm=p.Norm(lab.vector(np.ones(K)), lab.vector(np.zeros(K)), 1e-5),
        gate=None,
        starts=lab.starts(lengths),
        state=lab.state(np.zeros((B, H, N, N), np.float32)),
    )
    ops, dx = lab.ops, lab.matrix(x)
    y = ops.add(wkv)
    (first,) = ops.linear(p.Product(y, a, "relu_squared"))
    (second,) = ops.linear(p.Product(first, b))
    # The same factors through columns, which a launch rounds.
    (again,) = ops.linear(p.Product(p.Columns(y, 0, K), a, "relu_squared"))
    (both,) = ops.linear(p.Product(p.Columns(first, 0, 40), b))
    ops.add(p.AddGated(y, dx, dx))
    (changed,) = ops.linear(p.Product(y, a))
    y, first, second, again, both, changed = run(lab, y, first, second, again, both, changed)
    limit = 1e-4 if T <= 64 else 1e-3
    check(first, np.maximum((y - x.astype(float) ** 2) @ wa.T, 0) ** 2, limit)
    check(second, first.astype(float) @ wb.T, limit)
    check(changed, y.astype(float) @ wa.T, limit)
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(both, second)
