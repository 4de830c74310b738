"""The GPU's kernels in numba's simulator, against the float64 oracle."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import naive
import numpy as np
import pytest
import tiny
from lab import RNG, Lab, lone_arrays, normal, parts, quantize, simulated_gpu
from naive import error_ratio, sigmoid

from rwkv_cli.kernels import program as p
from rwkv_cli.quant.formats import Floats

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (rwkv-cli[cuda])", allow_module_level=True)

from rwkv_cli.kernels.cuda import backend as cuda
from rwkv_cli.kernels.cuda.array import DeviceArray
from rwkv_cli.kernels.cuda.device.compile import SIMULATED

pytestmark = [
    pytest.mark.skipif(not SIMULATED, reason="NUMBA_ENABLE_CUDASIM=0; benchmarks/gpu.py tests on a GPU"),
    # Floats of the simulator are numpy's, which warns where a GPU goes on.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with simulated_gpu(monkeypatch):
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


@pytest.mark.parametrize(("T", "D"), [(1, 3), (3, 40), (2, 129)])
def test_layer_norm(T: int, D: int) -> None:
    x, w, b, lab = normal(T, D, scale=30) + 5, normal(D), normal(D), Lab("cuda")
    (out,) = run(lab, lab.ops.add(p.LayerNorm(lab.matrix(x), p.Norm(lab.vector(w), lab.vector(b), 1e-5))))
    check(out, naive.layer_norm(x.astype(float), w, b, 1e-5))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("lengths", "D"), [((1,), 5), ((3, 1, 2), 33), ((0, 2, 0, 1, 0), 7)])
def test_token_shift(lengths: tuple[int, ...], D: int, normed: bool) -> None:
    x, w, b, before, lab = normal(sum(lengths), D), normal(D), normal(D), normal(len(lengths), D), Lab("cuda")
    last, node = lab.state(before), lab.matrix(x)
    want = x.astype(float)
    if normed:
        want = naive.layer_norm(want, w, b, 1e-5)
        node = lab.ops.add(p.LayerNorm(node, p.Norm(lab.vector(w), lab.vector(b), 1e-5)))
    delta = lab.ops.add(p.TokenShift(node, lab.starts(lengths), last))
    got, *normed_rows = run(lab, delta, *([node] if normed else []))
    earlier, after = np.vstack([want[:1], want[:-1]]), before.astype(float)
    for sequence, part in parts(lengths).items():
        earlier[part.start] = before[sequence]
        after[sequence] = want[part.stop - 1]
    check(got, earlier - want)
    for rows in normed_rows:
        check(rows, want)
    check(lab.state_after(last), after)
    untouched = sorted(set(range(len(lengths))) - set(parts(lengths)))
    np.testing.assert_array_equal(lab.state_after(last)[untouched], before[untouched])


def stored(w: Any, layout: str) -> tuple[Any, Any]:
    """A weight on the device and the matrix that it stands for."""
    q = quantize(w, layout)
    return cuda.weight(q), q.float32().astype(float)


@pytest.mark.parametrize("T", [1, 3, 10, 35])
def test_products(T: int) -> None:
    """Several in one launch: both layouts, ragged sizes, a shared and two mixed inputs, every activation, biases."""
    K, lab = 70, Lab("cuda")
    x, delta, row, mix, bias = normal(T, K), normal(T, K), uniform(0, 1, 1, K), uniform(0, 1, T, K), normal(1, 17)
    (a, wa), (b, wb), (c, wc), (d, wd) = (
        stored(normal(17, K), "tile"),
        stored(normal(48, K), "columns"),
        stored(normal(5, K, scale=0.1), "tile"),  # tanh is not at its ends
        stored(normal(17, 48, scale=1e-3), "tile"),
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
    )
    first, second, *_ = outs
    lab.ops.add(p.AddLinear(first, second, d))

    x, lerped = x.astype(float), x + delta.astype(float) * row
    product = x @ wa.T
    want = [
        sigmoid(product + bias) + x @ wb.T @ wd.T,
        x @ wb.T,
        np.tanh(lerped @ wc.T),
        lerped @ wa.T * sigmoid(lerped @ wa.T),
        np.maximum((x + delta.astype(float) * mix) @ wa.T, 0) ** 2,
        np.exp(-np.exp(product)),
        np.exp(-np.exp(-0.5) * sigmoid(product + bias)),
    ]
    for have, expected in zip(run(lab, *outs), want, strict=True):
        check(have, expected, 1e-4)  # 15 bits of activation


def test_a_product_does_not_lose_nan() -> None:
    w, _ = stored(normal(16, 64), "tile")
    for T in (1, 2):
        for bad in (np.nan, np.inf):
            x, lab = np.zeros((T, 64), np.float32), Lab("cuda")
            x[0, 40] = bad
            (y,) = run(lab, *lab.ops.linear(p.Product(lab.matrix(x), w, "relu_squared")))
            assert np.isnan(y[0]).all()
            assert (y[1:] == 0).all()


def floats(values: Any, dtype: str) -> tuple[Any, Any]:
    """A float weight on the device and the matrix that it stands for."""
    (rounded,) = tiny.rounded({"": values}, dtype).values()
    bits = np.frombuffer(tiny.raw(rounded, dtype), "<f4" if dtype == "F32" else "<u2").reshape(values.shape)
    return cuda.weight(Floats("float", dtype, bits)), rounded


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_float_products_and_tables(dtype: str) -> None:
    (weight, w), (rows, table), lab = floats(normal(17, 20), dtype), floats(normal(6, 11), dtype), Lab("cuda")
    x, delta, mix, ids = normal(3, 20), normal(3, 20), uniform(0, 1, 1, 20), [5, 0, 3]
    e = lab.ops.add(p.Embed(lab.ids(ids), rows))
    lab.ops.add(p.RoundTo(e, "BF16" if dtype == "F32" else "F16"))
    lab.ops.add(p.RoundTo(e, "F32"))
    lerp = p.Lerp(lab.matrix(x), lab.matrix(delta), lab.vector(mix))
    outs = lab.ops.linear(p.Product(lerp, weight, "sigmoid"), p.Product(p.Columns(lerp.x, 0, 20), weight))
    taken = lab.ops.add(p.TakeRows(e, lab.ids([2, 0])))
    y, plain, e, taken = run(lab, *outs, e, taken)
    check(y, sigmoid((x + delta.astype(float) * mix) @ w.T.astype(float)))
    check(plain, x @ w.T.astype(float))
    want = table[ids]
    if dtype == "F32":
        raw = want.view(np.uint32)
        want = ((raw + (0x7FFF + ((raw >> 16) & 1))) & 0xFFFF0000).view(np.float32)
    else:
        want = want.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(e, want)
    np.testing.assert_array_equal(taken, want[[2, 0]])


def test_an_int8_table() -> None:
    q, ids, lab = quantize(normal(7, 45), "rows"), [6, 6, 1], Lab("cuda")
    (e,) = run(lab, lab.ops.add(p.Embed(lab.ids(ids), lab.weight(q))))
    check(e, q.float32()[ids], 1e-7)


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


@pytest.mark.parametrize("lengths", [(1,), (4, 0, 1)])
def test_wkv4(lengths: tuple[int, ...]) -> None:
    T, D, B, lab = sum(lengths), 67, len(lengths), Lab("cuda")
    r, k, v, u = uniform(0, 1, T, D), normal(T, D, scale=2), normal(T, D), normal(D, scale=0.5)
    k[0, 0] = 200.0  # e^k would overflow
    w = -np.exp(uniform(-6, 2, D))
    start = np.tile(np.float32([[0], [0], [-1e30]]), (B, 1, D))
    state = lab.state(start)
    wkv = p.Wkv4(
        receptance=lab.matrix(r),
        key=lab.matrix(k),
        value=lab.matrix(v),
        decay=lab.vector(w),
        bonus=lab.vector(u),
        starts=lab.starts(lengths),
        state=state,
    )
    (y,) = run(lab, lab.ops.add(wkv))
    S = lab.state_after(state).astype(float)
    for b in set(range(B)) - set(parts(lengths)):
        np.testing.assert_array_equal(S[b], start[b])
    for b, part in parts(lengths).items():
        a, c = np.zeros(D), np.zeros(D)
        check(
            y[part], r[part] * naive.wkv4(k[part].astype(float), v[part].astype(float), w.astype(float), u, a, c), 5e-6
        )
        check((S[b, 0] / S[b, 1])[1:], (a / c)[1:], 2e-5)


HEADS = [((1,), 1, 8), ((2, 0, 1), 2, 16), ((3,), 1, 6)]


@pytest.mark.parametrize(("lengths", "H", "N"), HEADS)
@pytest.mark.parametrize("varying", [True, False])
def test_wkv6(lengths: tuple[int, ...], H: int, N: int, varying: bool) -> None:
    T, B, lab = sum(lengths), len(lengths), Lab("cuda")
    r, k, v, gate = (normal(T, H * N) for _ in range(4))
    w = np.exp(-np.exp(uniform(-8, 1, T if varying else 1, H * N)))
    u, weight, bias, before = normal(H, N, scale=0.3), normal(H * N), normal(H * N), normal(B, H, N, N)
    state = lab.state(before)
    wkv = p.Wkv6(
        receptance=lab.matrix(r),
        key=lab.matrix(k),
        value=lab.matrix(v),
        decay=lab.matrix(w) if varying else lab.vector(w),
        bonus=lab.vector(u),
        norm=p.Norm(lab.vector(weight), lab.vector(bias), 64e-5),
        gate=lab.matrix(gate) if varying else None,
        starts=lab.starts(lengths),
        state=state,
    )
    (y,) = run(lab, lab.ops.add(wkv))
    S = before.astype(float)
    heads = [a.reshape(-1, H, N).astype(float) for a in (r, k, v, np.broadcast_to(w, (T, H * N)))]
    rows = [naive.wkv6(*(a[part] for a in heads), u.astype(float), S[b]) for b, part in parts(lengths).items()]
    want = naive.group_norm(np.concatenate(rows).reshape(T, -1), weight, bias, H, 64e-5)
    check(y, want * gate if varying else want, 1e-5)
    check(lab.state_after(state), S)


@pytest.mark.parametrize(("lengths", "H", "N"), HEADS)
def test_wkv7(lengths: tuple[int, ...], H: int, N: int) -> None:
    T, B, D, lab = sum(lengths), len(lengths), H * N, Lab("cuda")
    r, k, v, g, first = (normal(T, D) for _ in range(5))
    w, a, mix = uniform(0.545, 1, T, D), uniform(0, 1, T, D), uniform(0, 1, T, D)
    k_k, k_a, r_k = uniform(0.6, 1.1, D), uniform(0.8, 1.2, D), normal(H, N, scale=0.3)
    weight, bias, before = normal(D), normal(D), normal(B, H, N, N)
    residual, state = B > 1, lab.state(before)
    wkv = p.Wkv7(
        receptance=lab.matrix(r),
        decay=lab.matrix(w),
        key=lab.matrix(k),
        value=lab.matrix(v),
        rate=lab.matrix(a),
        gate=lab.matrix(g),
        residual=p.ValueResidual(first=lab.matrix(first), gate=lab.matrix(mix)) if residual else None,
        key_scale=lab.vector(k_k),
        key_rate=lab.vector(k_a),
        bonus=lab.vector(r_k),
        norm=p.Norm(lab.vector(weight), lab.vector(bias), 64e-5),
        starts=lab.starts(lengths),
        state=state,
    )
    (y,) = run(lab, lab.ops.add(wkv))
    kk = (k.astype(float) * k_k).reshape(T, H, N)
    kk /= np.sqrt((kk**2).sum(-1, keepdims=True))
    key = k * (1 + (a.astype(float) - 1) * k_a)
    value = v + (first - v.astype(float)) * mix if residual else v.astype(float)
    r_h, w_h, key_h, value_h = (m.reshape(T, H, N).astype(float) for m in (r, w, key, value))
    each = [r_h, w_h, key_h, value_h, kk, kk * a.reshape(T, H, N)]
    S = before.transpose(0, 1, 3, 2).astype(float)
    rows = [naive.wkv7(*(m[part] for m in each), S[b]) for b, part in parts(lengths).items()]
    want = naive.group_norm(np.concatenate(rows).reshape(T, -1), weight, bias, H, 64e-5)
    want += ((r_h * key_h * r_k).sum(-1, keepdims=True) * value_h).reshape(T, -1)
    check(y, want * g, 1e-5)
    check(lab.state_after(state), S.transpose(0, 1, 3, 2))


def test_scores() -> None:
    left, right, targets, lab = normal(3, 97, scale=5), normal(3, 97, scale=5), np.array([0, 96, 40]), Lab("cuda")
    right[0], left[1, 3] = left[0], 1e4
    given, other = lab.matrix(left), lab.matrix(right)
    losses = lab.ops.add(p.CrossEntropy(given, lab.ids(targets)))
    nll, kl, same = (each[:, 0] for each in run(lab, losses, *lab.ops.add(p.Divergence(given, other))))
    log_p, log_q = (naive.log_softmax(a.astype(float)) for a in (left, right))
    np.testing.assert_allclose(nll, -log_p[np.arange(3), targets], rtol=1e-12)
    np.testing.assert_allclose(kl, (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(same, left.argmax(-1) == right.argmax(-1))


@pytest.mark.parametrize("T", [1, 3])
def test_levels_are_put_by_who_makes_an_activation(T: int) -> None:
    """A reader gets the same numbers as from a launch that rounds. A value that was changed is rounded again."""
    H, N, K, lab = 2, 32, 64, Lab("cuda")
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
        starts=lab.starts((T,)),
        state=lab.state(np.zeros((1, H, N, N), np.float32)),
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
    check(first, np.maximum((y - x.astype(float) ** 2) @ wa.T, 0) ** 2, 1e-4)
    check(second, first.astype(float) @ wb.T, 1e-4)
    check(changed, y.astype(float) @ wa.T, 1e-4)
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(both, second)
