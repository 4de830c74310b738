"""Each kernel against the float64 oracle: odd sizes, several blocks, decay over its real range, poisoned outputs."""

from itertools import pairwise
from typing import Any

import naive
import numpy as np
import pytest
from naive import error_ratio, sigmoid

from rwkv_cli.kernels import cpu, elementwise, matmul, scores, wkv
from rwkv_cli.kernels.quantize import quantize_rows
from rwkv_cli.quant.int8 import quantize as quantize_with
from rwkv_cli.quant.tensor import Int8, to_float32


def quantize(w: Any, layout: str = "tile") -> Int8:
    return quantize_with(w, layout, quantize_rows)


RNG = np.random.default_rng(0)
# tokens of each sequence, heads, head size
HEADS = [((1,), 1, 8), ((5,), 3, 16), ((33,), 2, 64), ((2, 1, 9), 5, 24), ((1, 1, 1, 1), 2, 16), ((4, 30, 1), 1, 64)]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that the backend allocates start as NaN, or the largest integer: what is not written is seen."""

    class Poisoned:
        """numpy, but for two functions."""

        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

        @staticmethod
        def empty(shape: Any, dtype: Any = float) -> Any:
            kind = np.dtype(dtype)
            worst = np.nan if kind.kind == "f" else True if kind.kind == "b" else np.iinfo(kind).max
            return np.full(shape, worst, kind)

        def empty_like(self, a: Any) -> Any:
            return self.empty(a.shape, a.dtype)

    monkeypatch.setattr(cpu, "np", Poisoned())


def normal(*shape: int, scale: float = 1.0) -> Any:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def guarded(T: int, D: int) -> tuple[Any, Any]:
    """A NaN output [T, D] and the array around it, whose first and last rows must stay what they are."""
    band = np.full((T + 2, D), 7.0, np.float32)
    band[1:-1] = np.nan
    return band[1:-1], band


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


def test_layer_norm() -> None:
    for T, D in [(1, 3), (4, 40), (7, 129)]:
        x, w, b = normal(T, D, scale=30) + 5, normal(D), normal(D)
        out, band = guarded(T, D)
        elementwise.layer_norm(x, w, b, 1e-5, out)
        check(out, naive.layer_norm(x.astype(float), w, b, 1e-5))
        assert (band[[0, -1]] == 7).all()


def test_group_norm() -> None:
    for lengths, H, N in HEADS:
        T = sum(lengths)
        x, w, b = normal(T, H * N, scale=0.02), normal(H * N), normal(H * N)
        want = naive.group_norm(x.astype(float), w, b, H, 64e-5)
        cpu.group_norm(x, w, b, H, 64e-5)
        check(x, want)


def test_token_shift_and_lerp() -> None:
    for lengths, D in [((1,), 5), ((6,), 33), ((1, 4, 1, 2), 33)]:
        T = sum(lengths)
        x, last = normal(T, D), normal(len(lengths), D)
        before = np.vstack([x[:1], x[:-1]]).astype(float)
        before[begins(lengths)[:-1]] = last
        delta = cpu.token_shift(x, begins(lengths), last)
        check(delta, before - x)
        np.testing.assert_array_equal(last, x[begins(lengths)[1:] - 1])
        for n in {1, T}:
            mix = RNG.random((n, D)).astype(np.float32)
            check(cpu.lerp(x, delta, mix), x + (before - x) * mix)


def test_elementwise() -> None:
    x, y = normal(3, 37, scale=4), normal(3, 37)
    big = np.array([[-200, -88, 0, 88, 200]], np.float32)
    with np.errstate(over="ignore"):
        for name, want in {
            "sigmoid": sigmoid,
            "silu": lambda a: a * sigmoid(a),
            "tanh": np.tanh,
            "relu_squared": lambda a: np.maximum(a, 0) ** 2,
        }.items():
            for values in (x, big):
                got = values.copy()
                getattr(elementwise, name)(got)
                check(got, want(values.astype(float)))
    for rows in (1, 3):
        got = x.copy()
        cpu.add(got, y[:rows])
        check(got, x.astype(float) + y[:rows])
    got = x.copy()
    cpu.multiply(got, y)
    check(got, x.astype(float) * y)
    got = RNG.uniform(-9, 2, (4, 19)).astype(np.float32)
    want = np.exp(-np.exp(got.astype(float)))
    cpu.decay(got)
    check(got, want)
    for part, whole in zip(cpu.split(x[:, :35].copy(), 5), np.split(x[:, :35], 5, axis=1), strict=True):
        assert part.flags.c_contiguous
        np.testing.assert_array_equal(part, whole)


def test_nan_is_never_lost() -> None:
    for kernel in (elementwise.relu_squared, elementwise.sigmoid, elementwise.silu, elementwise.tanh):
        x = np.full((1, 33), np.nan, np.float32)
        kernel(x)
        assert np.isnan(x).all()


@pytest.mark.parametrize(("lengths", "D"), [((1,), 3), ((9,), 40), ((70,), 65), ((2, 1, 9, 1), 65)])
def test_wkv4(lengths: tuple[int, ...], D: int) -> None:
    T = sum(lengths)
    k, v, u = normal(T, D, scale=2), normal(T, D), normal(D, scale=0.5)
    w = -np.exp(RNG.uniform(-6, 2, D)).astype(np.float32)
    state, states = inside(np.tile(np.float32([[0], [0], [-1e30]]), (len(lengths), 1, D)))
    y, band = guarded(T, D)
    wkv.wkv4(k, v, w, u, begins(lengths), state, y)
    assert (band[[0, -1]] == 7).all()
    assert (states[[0, -1]] == 7).all()
    for s, part in enumerate(rows(lengths)):
        a, b = np.zeros(D), np.zeros(D)
        check(y[part], naive.wkv4(k[part].astype(float), v[part].astype(float), w.astype(float), u, a, b), 5e-6)
        check(state[s, 0] * np.exp(state[s, 2].astype(float)), a, 2e-5)
        check(state[s, 1] * np.exp(state[s, 2].astype(float)), b, 2e-5)


def test_wkv4_does_not_overflow() -> None:
    k = np.array([[90.0], [-90.0], [300.0]], np.float32)
    state = np.array([[[0], [0], [-1e30]]], np.float32)
    y = cpu.wkv4(k, np.float32([[1], [2], [3]]), np.float32([-1e-3]), np.float32([0]), np.array([0, 3]), state)
    np.testing.assert_allclose(y[:, 0], [1, 1, 3], rtol=1e-6)
    assert np.isfinite(state).all()


@pytest.mark.parametrize(("lengths", "H", "N"), HEADS)
@pytest.mark.parametrize("varying", [True, False])
def test_wkv6(lengths: tuple[int, ...], H: int, N: int, varying: bool) -> None:
    T = sum(lengths)
    r, k, v = (normal(T, H * N) for _ in range(3))
    w = np.exp(-np.exp(RNG.uniform(-8, 1, (T if varying else 1, H * N)))).astype(np.float32)
    u, (S, states) = normal(H, N, scale=0.3), inside(normal(len(lengths), H, N, N))
    want_S = S.astype(float)
    parts = [a.reshape(-1, H, N).astype(float) for a in (r, k, v, np.broadcast_to(w, (T, H * N)))]
    want = [naive.wkv6(*(a[i] for a in parts), u.astype(float), want_S[b]) for b, i in enumerate(rows(lengths))]
    y, band = guarded(T, H * N)
    wkv.wkv6(r, k, v, w, u, begins(lengths), S, y)
    check(y, np.concatenate(want).reshape(T, -1))
    check(S, want_S)
    assert (band[[0, -1]] == 7).all()
    assert (states[[0, -1]] == 7).all()


@pytest.mark.parametrize(("lengths", "H", "N"), HEADS)
def test_wkv7(lengths: tuple[int, ...], H: int, N: int) -> None:
    T = sum(lengths)
    r, v = normal(T, H * N), normal(T, H * N)
    k, w, a = normal(T, H * N), normal(T, H * N, scale=3), normal(T, H * N)
    k_k, k_a = RNG.uniform(0.6, 1.1, H * N).astype(np.float32), RNG.uniform(0.8, 1.2, H * N).astype(np.float32)
    S, states = inside(normal(len(lengths), H, N, N))
    kk = (k.astype(float) * k_k).reshape(T, H, N)
    kk /= np.sqrt((kk**2).sum(-1, keepdims=True))
    rate = sigmoid(a.astype(float))
    want_k = k * (1 + (rate - 1) * k_a)
    want_w = np.exp(-np.exp(-0.5) * sigmoid(w.astype(float)))
    assert want_w.min() > 0.545
    want_S = S.astype(float)
    heads = [m.reshape(T, H, N).astype(float) for m in (r, want_w, want_k, v)]
    parts = [*heads, kk, kk * rate.reshape(T, H, N)]
    want = [naive.wkv7(*(a[i] for a in parts), want_S[b]) for b, i in enumerate(rows(lengths))]
    kappa, beta = cpu.delta_terms(k, w, a, k_k, k_a, H)
    check(k, want_k)
    check(w, want_w)
    check(kappa, kk.reshape(T, -1))
    y, band = guarded(T, H * N)
    wkv.wkv7(r, w, k, v, kappa, beta, begins(lengths), S, y)
    check(y, np.concatenate(want).reshape(T, -1), 5e-6)
    check(S, want_S, 5e-6)
    assert (band[[0, -1]] == 7).all()
    assert (states[[0, -1]] == 7).all()
    r_k = normal(H, N, scale=0.1)
    want = y + ((heads[0] * heads[2] * r_k).sum(-1, keepdims=True) * heads[3]).reshape(T, -1)
    cpu.bonus(y, r, k, v, r_k)
    check(y, want, 5e-6)
    first, gate = normal(T, H * N), normal(T, H * N)
    want = v + (first.astype(float) - v) * sigmoid(gate.astype(float))
    cpu.blend(v, first, gate)
    check(v, want)


def test_a_zero_key_has_no_direction() -> None:
    zero = np.zeros((1, 8), np.float32)
    kappa, beta = cpu.delta_terms(
        zero.copy(), zero.copy(), zero.copy(), np.ones(8, np.float32), np.ones(8, np.float32), 2
    )
    assert (kappa == 0).all()
    assert (beta == 0).all()


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
    weight = cpu.int8_weight(layout, stored.shape, stored.values, stored.scales, stored.unit)
    x = outliers(T, K)
    x[:, 1::3] = 0
    got = cpu.linear(x, weight)
    assert got.flags.c_contiguous
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


@pytest.mark.parametrize("layout", ["tile", "columns"])
def test_one_token_or_many_are_the_same_bits(layout: str) -> None:
    stored = quantize(normal(80, 200, scale=0.1), layout)
    weight = cpu.int8_weight(layout, stored.shape, stored.values, stored.scales, stored.unit)
    x = outliers(19, 200)
    x[x < 0] = 0
    whole = cpu.linear(x, weight)
    np.testing.assert_array_equal(whole, np.concatenate([cpu.linear(x[t : t + 1], weight) for t in range(19)]))


@pytest.mark.parametrize("layout", ["tile", "columns"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_reaches_every_output(layout: str, bad: float) -> None:
    stored = quantize(normal(48, 64), layout)
    weight = cpu.int8_weight(layout, stored.shape, stored.values, stored.scales, stored.unit)
    for T in (1, 8):
        x = np.zeros((T, 64), np.float32)
        x[0, 40] = bad
        got = cpu.linear(x, weight)
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
    got = cpu.linear(x, cpu.int8_weight("tile", stored.shape, stored.values, stored.scales, stored.unit))
    assert error_ratio(got / scale, x @ (stored.float32().astype(float).T / scale)) < 1e-4


@pytest.mark.parametrize(("T", "N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_float_linear(T: int, N: int, K: int, dtype: str) -> None:
    w = normal(N, K, scale=0.1)
    bits = {"F32": w, "F16": w.astype(np.float16).view(np.uint16), "BF16": (w.view(np.uint32) >> 16).astype(np.uint16)}
    x = normal(T, K)
    got = cpu.linear(x, cpu.float_weight(dtype, bits[dtype]), "tanh")
    check(got, np.tanh(x @ to_float32(bits[dtype], dtype).astype(float).T), 5e-6)
    table = cpu.embed(np.array([N - 1, 0, 0]), cpu.float_weight(dtype, bits[dtype]))
    np.testing.assert_array_equal(table, to_float32(bits[dtype], dtype)[[N - 1, 0, 0]])


def test_float16_subnormals() -> None:
    bits = np.array([[0x0001, 0x83FF, 0x0000, 0x8000, 0x0400]], np.uint16)
    got = cpu.linear(np.eye(5, dtype=np.float32) * 2**20, cpu.float_weight("F16", bits))
    np.testing.assert_array_equal(got[:, 0], bits.view(np.float16)[0].astype(np.float32) * 2**20)


@pytest.mark.parametrize(("dtype", "bits"), [("F32", 24), ("F16", 11), ("BF16", 8)])
def test_round_to(dtype: str, bits: int) -> None:
    x = np.concatenate([normal(100), np.float32([1 + 2.0**-bits, 1 + 3 * 2.0**-bits, 0, -1.5])])[None]
    mantissa, exponent = np.frexp(x.astype(float))
    want = np.ldexp(np.rint(mantissa * 2.0**bits) / 2.0**bits, exponent)  # ties to even
    cpu.round_to(x, dtype)
    np.testing.assert_array_equal(x, want)


def test_int8_embedding() -> None:
    stored = quantize(normal(9, 50), "rows")
    weight = cpu.int8_weight("rows", stored.shape, stored.values, stored.scales, stored.unit)
    np.testing.assert_array_equal(cpu.embed(np.array([8, 0, 3]), weight), stored.float32()[[8, 0, 3]])


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
    p, q = normal(5, 301, scale=6), normal(5, 301, scale=6)
    targets = RNG.integers(0, 301, 5)
    lp, lq = naive.log_softmax(p.astype(float)), naive.log_softmax(q.astype(float))
    nll = np.full(5, np.nan)
    scores.cross_entropy(p, targets, nll)
    np.testing.assert_allclose(nll, -lp[np.arange(5), targets], rtol=1e-6)
    kl, same = cpu.divergence(p, q)
    np.testing.assert_allclose(kl, (np.exp(lp) * (lp - lq)).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(same, p.argmax(-1) == q.argmax(-1))
    kl, same = cpu.divergence(p, p)
    np.testing.assert_allclose(kl, 0, atol=1e-9)
    assert same.all()


def test_activations_keep_fifteen_bits() -> None:
    x = outliers(3, 70)
    wide = matmul.has_vnni()
    planes = np.zeros((3, 2, 96), np.int8) if wide else np.zeros((3, 1, 96), np.int16)
    factors, offsets = np.zeros((3, 3), np.float32), np.zeros((3, 3), np.int32)
    matmul.quantize_activations(x, np.float32(1), planes, factors, offsets, 2)
    levels = planes.astype(int)
    total = levels[:, 0] * 256 + levels[:, 1] if wide else levels[:, 0]
    assert np.abs(total).max() == 32512
    np.testing.assert_array_equal(offsets, total.reshape(3, 3, 32).sum(-1) * 128)
    back = (total.reshape(3, 3, 32) * factors[:, :, None]).reshape(3, 96)
    np.testing.assert_allclose(back[:, :70], x, atol=0.51 * factors.max(), rtol=0)


def test_small_work_on_one_thread_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, x = quantize(normal(77, 100)), outliers(9, 100)
    weight = cpu.int8_weight("tile", stored.shape, stored.values, stored.scales, stored.unit)
    got = []
    for limit in (0, 1 << 40):
        monkeypatch.setattr(cpu, "_SMALL", limit)
        monkeypatch.setattr(cpu, "_SMALL_PRODUCT", limit)
        got.append(cpu.linear(x, weight))
    np.testing.assert_array_equal(*got)


def test_exp() -> None:
    x = np.concatenate([np.linspace(-87.3, 88.3, 200_001), [0, -0.0, 1e-30, -1e-8]]).astype(np.float32)
    got = np.array([elementwise.exp(value) for value in x[::50]])
    np.testing.assert_allclose(got, np.exp(x[::50].astype(np.float64)), rtol=2.5e-7)
    assert elementwise.exp(np.float32(-1e30)) == elementwise.exp(np.float32(-np.inf)) == 0
    assert elementwise.exp(np.float32(np.inf)) == elementwise.exp(np.float32(1e30)) == np.inf
    assert np.isnan(elementwise.exp(np.float32(np.nan)))
    assert elementwise.exp(np.float32(0)) == 1
