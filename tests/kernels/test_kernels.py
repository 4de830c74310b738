"""Each kernel against the float64 oracle: odd sizes, several blocks, decay over its real range, poisoned outputs."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import naive
import numpy as np
import pytest
from naive import error_ratio, sigmoid

from rwkv_cli.kernels.contract import Lerp, Norm, Product
from rwkv_cli.kernels.cpu import elementwise, matmul
from rwkv_cli.kernels.cpu import lower as cpu
from rwkv_cli.kernels.cpu.quantize_weights import quantize_rows
from rwkv_cli.kernels.cpu.team import Program
from rwkv_cli.quant.dtypes import to_float32
from rwkv_cli.quant.formats.int8 import Int8
from rwkv_cli.quant.formats.int8 import quantize as quantize_with

BAND = 256


def quantize(w: Any, layout: str = "tile") -> Int8:
    return quantize_with(w, layout, quantize_rows)


def stored_weight(stored: Int8) -> Any:
    return cpu.int8_weight(stored.layout, stored.shape, stored.values, stored.scales, stored.unit)


def run(build: Callable[[Any], Any], *inputs: Any, threads: int = 2) -> Any:
    """What a program makes: `build` records it and returns an array, or several."""
    ops = cpu.record(inputs, threads)
    made = build(ops)
    ops.run(inputs)
    return [ops.read(array) for array in made] if isinstance(made, (list, tuple)) else ops.read(made)


def linear(x: Any, weight: Any, activation: Any = "", bias: Any = None, threads: int = 2) -> Any:
    return run(lambda ops: ops.linear(Product(x, weight, activation, bias)), threads=threads)[0]


RNG = np.random.default_rng(0)
# tokens of each sequence, heads, head size
HEADS = [((1,), 1, 8), ((5,), 3, 16), ((33,), 2, 64), ((2, 1, 9), 5, 24), ((1, 1, 1, 1), 2, 16), ((4, 30, 1), 1, 64)]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program's arrays start as NaN, or the largest integer, so that what is not written is seen, and lie between
    bands that must stay what they are."""
    blocks = []

    def empty(self: Any, shape: Any, dtype: Any = np.float32) -> Any:  # noqa: ARG001
        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        block = np.full(size + 2 * BAND, 0xA5, np.uint8)
        blocks.append((block, size))
        array = block[BAND : BAND + size].view(kind).reshape(shape)
        array[...] = np.nan if kind.kind == "f" else True if kind.kind == "b" else np.iinfo(kind).max
        return array

    monkeypatch.setattr(cpu.Workspace, "empty", empty)
    yield
    for block, size in blocks:
        assert (block[:BAND] == 0xA5).all()
        assert (block[BAND + size :] == 0xA5).all()


def normal(*shape: int, scale: float = 1.0) -> Any:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def inside(states: Any) -> tuple[Any, Any]:
    """These states of a batch among others', and all of them: the first and the last must stay what they are."""
    band = np.full((len(states) + 2, *states.shape[1:]), 7.0, np.float32)
    band[1:-1] = states
    return band[1:-1], band


def begins(lengths: tuple[int, ...]) -> Any:
    """Where each sequence begins, and where the last one ends."""
    return np.cumsum([0, *lengths])


def rows(lengths: tuple[int, ...]) -> list[slice]:
    """Each sequence's rows."""
    return [slice(a, b) for a, b in pairwise(begins(lengths))]


def check(got: Any, want: Any, limit: float = 2e-6) -> None:
    assert error_ratio(got, want) < limit
    assert np.abs(got - want).max() < 20 * limit * max(1.0, np.abs(want).max())


@pytest.mark.parametrize("threads", [1, 2])
def test_layer_norm(threads: int) -> None:
    for T, D in [(1, 3), (4, 40), (7, 129), (130, 129)]:
        x, w, b = normal(T, D, scale=30) + 5, normal(D), normal(D)
        got = run(lambda ops, x=x, w=w, b=b: ops.layer_norm(x, Norm(w, b, 1e-5)), threads=threads)
        check(got, naive.layer_norm(x.astype(float), w, b, 1e-5))


def test_token_shift() -> None:
    for lengths, D in [((1,), 5), ((6,), 33), ((1, 4, 1, 2), 33), ((1, 300, 2), 70)]:
        T = sum(lengths)
        x, (last, band) = normal(T, D), inside(normal(len(lengths), D))
        before = np.vstack([x[:1], x[:-1]]).astype(float)
        before[begins(lengths)[:-1]] = last
        starts = begins(lengths)
        check(run(lambda ops, a=(x, starts, last): ops.token_shift(*a), last), before - x)
        np.testing.assert_array_equal(last, x[starts[1:] - 1])
        assert (band[[0, -1]] == 7).all()


def activations() -> dict[str, Any]:
    return {
        "": lambda a: a,
        "sigmoid": sigmoid,
        "silu": lambda a: a * sigmoid(a),
        "tanh": np.tanh,
        "relu_squared": lambda a: np.maximum(a, 0) ** 2,
        "decay": lambda a: np.exp(-np.exp(a)),
        "soft_decay": lambda a: np.exp(-np.exp(-0.5) * sigmoid(a)),
    }


@pytest.mark.parametrize("name", list(activations()))
def test_activations(name: str) -> None:
    """Behind an exact product: with a matrix of one 1 a row. Far out for all, then where they bend."""
    want = activations()[name]
    one = cpu.float_weight("F32", np.eye(9, dtype=np.float32))
    with np.errstate(over="ignore"):
        for x in (normal(3, 9, scale=3), np.float32([[-200, -88, -1, 0, 1, 5, 88, 200, 1e-3]])):
            check(linear(x, one, name), want(x.astype(float)))
    assert np.isnan(linear(np.full((1, 9), np.nan, np.float32), one, name)).all()


def test_add_gated_and_take() -> None:
    for T in (1, 3, 90):
        x, y, gate = normal(T, 300), normal(T, 300), normal(T, 300)
        want = x.astype(float) + y.astype(float) * gate
        ops = cpu.record([x], 2)
        ops.add_gated(x, y, gate)
        rows = np.array([T - 1, 0])
        taken = ops.take(x, rows)
        ops.run([x])
        check(x, want)
        np.testing.assert_array_equal(ops.read(taken), x[rows])


@pytest.mark.parametrize(("lengths", "D"), [((1,), 3), ((9,), 40), ((70,), 65), ((2, 1, 9, 1), 65)])
def test_wkv4(lengths: tuple[int, ...], D: int) -> None:
    T = sum(lengths)
    k, v, u, r = normal(T, D, scale=2), normal(T, D), normal(D, scale=0.5), normal(T, D)
    w = -np.exp(RNG.uniform(-6, 2, D)).astype(np.float32)
    state, states = inside(np.tile(np.float32([[0], [0], [-1e30]]), (len(lengths), 1, D)))
    y = run(lambda ops: ops.wkv4(r, k, v, w, u, begins(lengths), state), state)
    assert (states[[0, -1]] == 7).all()
    for s, part in enumerate(rows(lengths)):
        a, b = np.zeros(D), np.zeros(D)
        want = naive.wkv4(k[part].astype(float), v[part].astype(float), w.astype(float), u, a, b)
        check(y[part], r[part] * want, 5e-6)
        check(state[s, 0] * np.exp(state[s, 2].astype(float)), a, 2e-5)
        check(state[s, 1] * np.exp(state[s, 2].astype(float)), b, 2e-5)


def test_wkv4_does_not_overflow() -> None:
    k = np.array([[90.0], [-90.0], [300.0]], np.float32)
    state = np.array([[[0], [0], [-1e30]]], np.float32)
    one, starts, w, u = np.ones((3, 1), np.float32), np.array([0, 3]), np.float32([-1e-3]), np.float32([0])
    y = run(lambda ops: ops.wkv4(one, k, np.float32([[1], [2], [3]]), w, u, starts, state), state)
    np.testing.assert_allclose(y[:, 0], [1, 1, 3], rtol=1e-6)
    assert np.isfinite(state).all()


def head_norm(D: int) -> Norm:
    return Norm(normal(D), normal(D), 64e-5)


@pytest.mark.parametrize(("lengths", "H", "N"), HEADS)
@pytest.mark.parametrize("varying", [True, False])
def test_wkv6(lengths: tuple[int, ...], H: int, N: int, varying: bool) -> None:
    T = sum(lengths)
    r, k, v = (normal(T, H * N) for _ in range(3))
    w = np.exp(-np.exp(RNG.uniform(-8, 1, (T if varying else 1, H * N)))).astype(np.float32)
    u, (S, states) = normal(H, N, scale=0.3), inside(normal(len(lengths), H, N, N))
    norm, gate = head_norm(H * N), normal(T, H * N) if varying else None
    want_S = S.astype(float)
    parts = [a.reshape(-1, H, N).astype(float) for a in (r, k, v, np.broadcast_to(w, (T, H * N)))]
    want = [naive.wkv6(*(a[i] for a in parts), u.astype(float), want_S[b]) for b, i in enumerate(rows(lengths))]
    normed = naive.group_norm(np.concatenate(want).reshape(T, -1), norm.weight, norm.bias, H, norm.eps)
    y = run(lambda ops: ops.wkv6(r, k, v, w, u, norm, gate, begins(lengths), S), S)
    check(y, normed if gate is None else normed * gate, 1e-5)
    check(S, want_S)
    assert (states[[0, -1]] == 7).all()


@pytest.mark.parametrize(("lengths", "H", "N"), HEADS)
@pytest.mark.parametrize("residual", [True, False])
def test_wkv7(lengths: tuple[int, ...], H: int, N: int, residual: bool) -> None:
    T = sum(lengths)
    r, k, v, g, first = (normal(T, H * N) for _ in range(5))
    w = np.exp(-np.exp(-0.5) * RNG.random((T, H * N))).astype(np.float32)
    assert w.min() > 0.545
    a, mix = RNG.random((2, T, H * N)).astype(np.float32)
    k_k, k_a = RNG.uniform(0.6, 1.1, H * N).astype(np.float32), RNG.uniform(0.8, 1.2, H * N).astype(np.float32)
    r_k, norm = normal(H, N, scale=0.1), head_norm(H * N)
    S, states = inside(normal(len(lengths), H, N, N))
    want_S = S.astype(float).transpose(0, 1, 3, 2).copy()  # the oracle's is [value, key]
    value = v + (first.astype(float) - v) * mix if residual else v.astype(float)
    kk = (k.astype(float) * k_k).reshape(T, H, N)
    kk /= np.sqrt((kk**2).sum(-1, keepdims=True))
    key = k * (1 + (a.astype(float) - 1) * k_a)
    heads = [m.reshape(T, H, N).astype(float) for m in (r, w, key, value)]
    parts = [*heads, kk, kk * a.reshape(T, H, N)]
    want = [naive.wkv7(*(m[i] for m in parts), want_S[b]) for b, i in enumerate(rows(lengths))]
    normed = naive.group_norm(np.concatenate(want).reshape(T, -1), norm.weight, norm.bias, H, norm.eps)
    normed += ((heads[0] * heads[2] * r_k).sum(-1, keepdims=True) * heads[3]).reshape(T, -1)
    carried = (first, mix) if residual else None
    y = run(lambda ops: ops.wkv7(r, w, k, v, a, g, carried, k_k, k_a, r_k, norm, begins(lengths), S), S)
    check(y, normed * g, 1e-5)
    check(S, want_S.transpose(0, 1, 3, 2), 5e-6)
    assert (states[[0, -1]] == 7).all()


def test_a_zero_key_has_no_direction() -> None:
    zero, one = np.zeros((1, 8), np.float32), np.ones(8, np.float32)
    S = normal(1, 2, 4, 4)
    want = S.copy()
    starts, norm = np.array([0, 1]), head_norm(8)
    r_k, w = zero.reshape(2, 4), zero + 1
    run(lambda ops: ops.wkv7(zero, w, zero, zero, zero, zero, None, one, one, r_k, norm, starts, S), S)
    np.testing.assert_array_equal(S, want)


def outliers(T: int, K: int) -> Any:
    """Activations with one channel thousands of times the others, as layer 0's att.output sees."""
    x = normal(T, K)
    x[:, K // 3] *= 3000
    return x


SHAPES = [(1, 5, 7), (2, 16, 32), (7, 40, 70), (13, 300, 192), (1, 96, 512), (6, 33, 64), (25, 17, 100), (1, 512, 96)]


@pytest.mark.parametrize(("T", "N", "K"), SHAPES)
@pytest.mark.parametrize("layout", ["tile", "columns"])
def test_int8_linear(T: int, N: int, K: int, layout: str) -> None:
    """Beside the weights' own rounding only the activations' 15 bits remain, outlier or not."""
    stored = quantize(normal(N, K, scale=0.1), layout)
    weight = stored_weight(stored)
    x = outliers(T, K)
    x[:, 1::3] = 0
    got = linear(x, weight)
    w = stored.float32().astype(float)
    assert error_ratio(got, x @ w.T) < 1e-4
    # against activations rounded just so, the sums are exact
    groups = -(-K // 32)
    parts = np.pad(x, ((0, 0), (0, groups * 32 - K))).reshape(T, groups, 32)
    scale = np.abs(parts).max(-1, keepdims=True).astype(float) / 32512
    levels = np.rint(parts / np.where(scale > 0, scale, 1))
    want = np.einsum("tgc,ngc->tn", levels * scale, np.pad(w, ((0, 0), (0, groups * 32 - K))).reshape(N, groups, 32))
    close = np.isclose(got, want, rtol=1e-5, atol=1e-4 * np.abs(want).max())
    assert close.all()


@pytest.mark.parametrize(("N", "K"), [(40, 70), (48, 64)])
@pytest.mark.parametrize("layout", ["tile", "columns"])
@pytest.mark.parametrize("floats", [True, False])
def test_what_a_product_reads_and_adds_to(N: int, K: int, layout: str, floats: bool) -> None:
    """Several at once, of mixes or of ranges of columns, with bias and activation, and onto what is there."""
    stored = quantize(normal(N, K, scale=0.1), layout)
    weight = cpu.float_weight("F32", stored.float32()) if floats else stored_weight(stored)
    w = stored.float32().astype(float)
    for T in (1, 7, 14):
        x, delta, bias = normal(T, K), normal(T, K), normal(1, N)
        for mix in (normal(1, K), normal(T, K)):
            wide = normal(T, 2 * K)

            def build(
                ops: Any, wide: Any = wide, bias: Any = bias, x: Any = x, delta: Any = delta, mix: Any = mix
            ) -> Any:
                x = Lerp(x, delta, mix)
                left, right = ops.split(wide, 2)
                return ops.linear(
                    Product(x, weight, "sigmoid", bias), Product(right, weight, bias=bias), Product(x, weight),
                    Product(left, weight, "relu_squared"),
                )  # fmt: skip

            mixed = x.astype(float) + delta.astype(float) * mix
            want = [
                sigmoid(mixed @ w.T + bias), wide[:, K:] @ w.T + bias, mixed @ w.T,
                np.maximum(wide[:, :K] @ w.T, 0) ** 2,
            ]  # fmt: skip
            for got, right in zip(run(build), want, strict=True):
                check(got, right, 1e-4)
        onto = normal(T, N)
        right = onto.astype(float) + x.astype(float) @ w.T
        ops = cpu.record([onto], 2)
        ops.add_linear(onto, x, weight)
        ops.run([onto])
        check(onto, right, 1e-4)


@pytest.mark.parametrize("layout", ["tile", "columns"])
def test_one_token_or_many_are_the_same_bits(layout: str) -> None:
    stored = quantize(normal(80, 200, scale=0.1), layout)
    weight = stored_weight(stored)
    x = outliers(19, 200)
    x[x < 0] = 0
    x[:, 64:96] = 0
    whole = linear(x, weight)
    np.testing.assert_array_equal(whole, np.concatenate([linear(x[t : t + 1], weight) for t in range(19)]))
    onto = normal(19, 80)
    both = []
    for pieces in ([slice(0, 19)], [slice(t, t + 1) for t in range(19)]):
        y = onto.copy()
        for piece in pieces:
            part = y[piece]
            ops = cpu.record([part], 2)
            ops.add_linear(part, x[piece], weight)
            ops.run([part])
        both.append(y)
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("layout", ["tile", "columns"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_reaches_every_output(layout: str, bad: float) -> None:
    stored = quantize(normal(48, 64), layout)
    weight = stored_weight(stored)
    for T in (1, 8):
        x = np.zeros((T, 64), np.float32)
        x[0, 40] = bad
        got = linear(x, weight)
        assert not np.isfinite(got[0]).any()
        assert (got[1:] == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 1e6])
def test_weights_of_any_size(scale: float) -> None:
    w = normal(16, 64, scale=scale)
    w[3] = 0
    w[5, :40] *= 1e-6
    stored = quantize(w)
    assert error_ratio(stored.float32() / scale, w / scale) < 0.006
    assert (stored.float32()[3] == 0).all()
    x = normal(2, 64)
    got = linear(x, stored_weight(stored))
    assert error_ratio(got / scale, x @ (stored.float32().astype(float).T / scale)) < 1e-4


@pytest.mark.parametrize(("T", "N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_float_linear(T: int, N: int, K: int, dtype: str) -> None:
    w = normal(N, K, scale=0.1)
    bits = {"F32": w, "F16": w.astype(np.float16).view(np.uint16), "BF16": (w.view(np.uint32) >> 16).astype(np.uint16)}
    x = normal(T, K)
    got = linear(x, cpu.float_weight(dtype, bits[dtype]), "tanh")
    check(got, np.tanh(x @ to_float32(bits[dtype], dtype).astype(float).T), 5e-6)
    ids = np.array([N - 1, 0, 0])
    table = run(lambda ops: ops.embed(ids, cpu.float_weight(dtype, bits[dtype])), ids)
    np.testing.assert_array_equal(table, to_float32(bits[dtype], dtype)[[N - 1, 0, 0]])


def test_float16_subnormals() -> None:
    bits = np.array([[0x0001, 0x83FF, 0x0000, 0x8000, 0x0400]], np.uint16)
    got = linear(np.eye(5, dtype=np.float32) * 2**20, cpu.float_weight("F16", bits))
    np.testing.assert_array_equal(got[:, 0], bits.view(np.float16)[0].astype(np.float32) * 2**20)


@pytest.mark.parametrize(("dtype", "bits"), [("F32", 24), ("F16", 11), ("BF16", 8)])
def test_round_to(dtype: str, bits: int) -> None:
    x = np.concatenate([normal(100), np.float32([1 + 2.0**-bits, 1 + 3 * 2.0**-bits, 0, -1.5])])[None]
    if dtype == "F16":
        x = np.concatenate([x[0], normal(50, scale=1e-5), np.float32([65519, 65520, -7e4, 2.0**-25, 3 * 2.0**-25])])[
            None
        ]
        with np.errstate(over="ignore"):
            want = x.astype(np.float16).astype(np.float32)
        ops = cpu.record([x], 2)
        ops.round_to(x, dtype)
        ops.run([x])
        np.testing.assert_array_equal(x, want)
        return
    mantissa, exponent = np.frexp(x.astype(float))
    want = np.ldexp(np.rint(mantissa * 2.0**bits) / 2.0**bits, exponent)  # ties to even
    ops = cpu.record([x], 2)
    ops.round_to(x, dtype)
    ops.run([x])
    np.testing.assert_array_equal(x, want)


def test_int8_embedding() -> None:
    stored = quantize(normal(9, 50), "rows")
    weight = stored_weight(stored)
    ids = np.array([8, 0, 3])
    np.testing.assert_array_equal(run(lambda ops: ops.embed(ids, weight), ids), stored.float32()[ids])


@pytest.mark.parametrize(("N", "K"), [(16, 32), (40, 70), (256, 64), (320, 33), (5, 5)])
def test_layouts_hold_the_same_numbers(N: int, K: int) -> None:
    w = normal(N, K)
    all_: list[Int8] = [quantize(w, layout) for layout in ("rows", "tile", "columns")]
    for stored in all_:
        np.testing.assert_array_equal(stored.float32(), all_[0].float32())
    scale = np.abs(w).max() / 127
    assert np.abs(all_[0].float32() - w).max() < 0.52 * scale


def test_the_search_beats_plain_rounding() -> None:
    """Mean squared error against Q8_0's (absmax/127 rounded to float16), same groups, same bits."""
    w = normal(256, 256)
    parts = w.reshape(-1, 32)
    scale = (np.abs(parts).max(1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    plain = np.rint(parts / scale) * scale
    ours = quantize(w, "rows").float32().reshape(-1, 32)
    assert ((ours - parts) ** 2).mean() < 0.8 * ((plain - parts) ** 2).mean()


def test_scores() -> None:
    p, q = normal(5, 3001, scale=6), normal(5, 3001, scale=6)
    targets = RNG.integers(0, 3001, 5)
    lp, lq = naive.log_softmax(p.astype(float)), naive.log_softmax(q.astype(float))
    nll = run(lambda ops: ops.cross_entropy(p, targets), targets)
    np.testing.assert_allclose(nll, -lp[np.arange(5), targets], rtol=1e-6, atol=1e-6)
    kl, same = run(lambda ops: ops.divergence(p, q))
    np.testing.assert_allclose(kl, (np.exp(lp) * (lp - lq)).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(same, p.argmax(-1) == q.argmax(-1))
    kl, same = run(lambda ops: ops.divergence(p, p))
    np.testing.assert_allclose(kl, 0, atol=1e-9)
    assert same.all()
    p[2, 7] = np.nan
    assert (
        np.isnan(run(lambda ops: ops.cross_entropy(p, targets), targets)).tolist() == [False] * 2 + [True] + [False] * 2
    )


def test_activations_keep_fifteen_bits() -> None:
    x = outliers(3, 70)
    ops = cpu.record([], 2)
    rounded = ops._round(x)
    ops.run([])
    levels = rounded.levels.astype(int)
    total = levels[:, :, 0] * 256 + levels[:, :, 1] if matmul.VNNI else levels[:, :, 0]
    assert np.abs(total).max() == 32512
    np.testing.assert_array_equal(rounded.offsets, total.sum(-1) * -128)
    back = (total * rounded.factors[:, :, None]).reshape(3, 96)
    np.testing.assert_allclose(back[:, :70], x, atol=0.51 * rounded.factors.max(), rtol=0)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    for layout in ("tile", "columns"):
        stored, x = quantize(normal(160, 300), layout), outliers(9, 300)
        for rows_ in (x, x[:1]):
            got = [linear(rows_, stored_weight(stored), threads=threads) for threads in (1, 2, 3)]
            np.testing.assert_array_equal(got[0], got[1])
            np.testing.assert_array_equal(got[0], got[2])


def test_exp() -> None:
    x = np.concatenate([np.linspace(-87.3, 88.3, 200_001), [0, -0.0, 1e-30, -1e-8]]).astype(np.float32)
    exp = elementwise.exp
    got = np.array([exp(value) for value in x[::50]])
    np.testing.assert_allclose(got, np.exp(x[::50].astype(np.float64)), rtol=2.5e-7)
    assert elementwise.exp(np.float32(-1e30)) == elementwise.exp(np.float32(-np.inf)) == 0
    assert elementwise.exp(np.float32(np.inf)) == elementwise.exp(np.float32(1e30)) == np.inf
    assert np.isnan(elementwise.exp(np.float32(np.nan)))
    assert elementwise.exp(np.float32(0)) == 1


def test_where_arrays_lie_does_not_change_the_bits() -> None:
    memory, x, w, b = np.zeros(4096, np.float32), normal(1, 40), normal(40), normal(40)
    norm, found = Norm(w, b, 1e-5), set()
    for distance in range(41, 400, 7):
        here, out = memory[:40].reshape(1, 40), memory[distance : distance + 40].reshape(1, 40)
        here[:] = x
        program = Program()
        program.add(elementwise.layer_norm, 1, here, norm.weight, norm.bias, norm.eps, out, 1)
        program.run(1)
        found.add(out.tobytes())
    assert len(found) == 1
