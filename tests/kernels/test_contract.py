"""The debts of every device: each operation against the float64 oracle.

Odd sizes, several blocks, sequences without rows, decay over its real range, and outputs that start as NaN.
"""

from typing import Any

import naive
import numpy as np
import pytest
from extras import needs
from lab import RNG, Cases, Lab, begins, cases, check, each_device, linear, normal, parts, quantize, with_each
from naive import sigmoid

from rwkv_cli.kernels.program import (
    ACTIVATIONS,
    AddGated,
    CrossEntropy,
    Divergence,
    Gate,
    LayerNorm,
    Norm,
    Product,
    RoundTo,
    RowProducts,
    TakeRows,
    TokenShift,
    ValueResidual,
    Wkv4,
    Wkv6,
    Wkv7,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:RuntimeWarning:rwkv_cli.kernels.cuda"),
    pytest.mark.usefixtures("lone_memory"),
]

# tokens of each sequence, heads, head size
HEADS: Cases = [
    ((1,), 1, 8), ((5,), 3, 16), ((33,), 2, 64), ((2, 0, 9), 5, 24), ((1, 1, 1, 1), 2, 16), ((0, 4, 30, 1), 1, 64),
    ((1, 3), 1, 64), ((9,), 1, 24),
]  # fmt: skip
FEW_HEADS: Cases = [((1,), 1, 8), ((2, 0, 3), 2, 24), ((3,), 1, 6), ((9,), 1, 8)]
NORMS: Cases = [(1, 3), (4, 40), (7, 129), (130, 129), (2, 4096)]


@cases("T, D, threads, room", with_each(with_each(NORMS, 1, 2), 0, 5), [(1, 3, 1, 0), (3, 40, 1, 5), (2, 129, 1, 0)])
def test_layer_norm(device: str, T: int, D: int, threads: int, room: int) -> None:
    x, w, b = normal(T, D, scale=30) + 5, normal(D), normal(D)
    lab = Lab(device, threads, room)
    got = lab.run(lab.ops.add(LayerNorm(lab.matrix(x), Norm(lab.vector(w), lab.vector(b), 1e-5))))
    check(got, naive.layer_norm(x.astype(float), w, b, 1e-5))


SHIFTS: Cases = [
    ((1,), 5),
    ((6,), 33),
    ((1, 4, 0, 2), 33),
    ((1, 300, 2), 70),
    ((0, 3), 260),
    ((1, 2), 4096),
    ((19,), 600),
]


@cases("lengths, D, normed", with_each(SHIFTS, False, True), with_each([((1,), 5), ((0, 2, 0, 1), 33)], False, True))
def test_token_shift(device: str, lengths: tuple[int, ...], D: int, normed: bool) -> None:
    """The shift of a matrix, and of a norm that comes just before."""
    T, lab = sum(lengths), Lab(device)
    x, last = normal(T, D), normal(len(lengths), D)
    w, b = normal(D), normal(D)
    state, node = lab.state(last), lab.matrix(x)
    if normed:
        x = naive.layer_norm(x.astype(float), w, b, 1e-5)
        node = lab.ops.add(LayerNorm(node, Norm(lab.vector(w), lab.vector(b), 1e-5)))
    outputs = lab.ops.add(TokenShift(node, lab.starts(lengths), state)), node if normed else lab.value(x)
    delta, same = lab.run(*outputs)
    want_last = last.copy()
    for b_, rows in parts(lengths).items():
        check(delta[rows], np.vstack([last[b_ : b_ + 1], x[rows][:-1]]).astype(float) - x[rows])
        want_last[b_] = x[rows][-1]
    check(same, x.astype(float))
    check(lab.state_after(state), want_last)


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


@cases("name", [(name,) for name in ACTIVATIONS], [(name,) for name in ACTIVATIONS])
def test_activations(device: str, name: str) -> None:
    """Behind an exact product, with a matrix of one 1 a row. Far out for all, then where they bend."""
    want, one = activations()[name], np.eye(9, dtype=np.float32)
    with np.errstate(over="ignore"):
        for x in (normal(3, 9, scale=3), np.float32([[-200, -88, -1, 0, 1, 5, 88, 200, 1e-3]])):
            check(linear(x, one, name, device=device), want(x.astype(float)))
    assert np.isnan(linear(np.full((1, 9), np.nan, np.float32), one, name, device=device)).all()


@cases("T, D", [(1, 300), (3, 300), (90, 300)], [(1, 37), (3, 37)])
def test_add_gated_and_take(device: str, T: int, D: int) -> None:
    x, y, gate = normal(T, D), normal(T, D), normal(T, D)
    lab = Lab(device)
    onto, rows = lab.value(x), np.array([T - 1, 0])
    lab.ops.add(AddGated(onto, lab.matrix(y), lab.matrix(gate)))
    got, taken = lab.run(onto, lab.ops.add(TakeRows(onto, lab.ids(rows))))
    check(got, x.astype(float) + y.astype(float) * gate)
    np.testing.assert_array_equal(taken, got[rows])


ROWS: Cases = [(1, 1, 3), (1, 32, 32), (5, 7, 19), (130, 6, 6), (33, 32, 32)]


@cases("T, K, N, room", with_each(ROWS, 0, 9), [(1, 3, 5, 0), (3, 6, 35, 2)])
def test_a_gate_of_products_by_row(device: str, T: int, K: int, N: int, room: int) -> None:
    """Each row times a matrix of its own, as a gate on what is there."""
    x, matrices, onto = normal(T, K), normal(T, K * N), normal(T, N)
    lab = Lab(device, room=room)
    gated = lab.value(onto)
    gate = lab.ops.add(RowProducts(lab.matrix(x), lab.matrix(matrices)))
    lab.ops.add(Gate(gated, gate))
    want = np.einsum("tk,tkn->tn", x.astype(float), matrices.reshape(T, K, N))
    for got, right in zip(lab.run(gate, gated), (want, onto * want), strict=True):
        check(got, right)


@cases("lengths, D", [((1,), 3), ((9,), 40), ((70,), 65), ((2, 0, 9, 1), 65)], [((1,), 3), ((4, 0, 1), 67)])
def test_wkv4(device: str, lengths: tuple[int, ...], D: int) -> None:
    T, lab = sum(lengths), Lab(device)
    k, v, u, r = normal(T, D, scale=2), normal(T, D), normal(D, scale=0.5), normal(T, D)
    w = -np.exp(RNG.uniform(-6, 2, D)).astype(np.float32)
    state = lab.state(np.tile(np.float32([[0], [0], [-1e30]]), (len(lengths), 1, D)))
    op = Wkv4(
        receptance=lab.matrix(r), key=lab.matrix(k), value=lab.matrix(v), decay=lab.vector(w), bonus=lab.vector(u),
        starts=lab.starts(lengths), state=state,
    )  # fmt: skip
    y = lab.run(lab.ops.add(op))
    after = lab.state_after(state)
    for s in set(range(len(lengths))) - set(parts(lengths)):
        np.testing.assert_array_equal(after[s], np.tile(np.float32([[0], [0], [-1e30]]), D))
    for s, part in parts(lengths).items():
        a, b = np.zeros(D), np.zeros(D)
        want = naive.wkv4(k[part].astype(float), v[part].astype(float), w.astype(float), u, a, b)
        check(y[part], r[part] * want, 5e-6)
        check(after[s, 0] * np.exp(after[s, 2].astype(float)), a, 2e-5)
        check(after[s, 1] * np.exp(after[s, 2].astype(float)), b, 2e-5)


@each_device
def test_wkv4_does_not_overflow(device: str) -> None:
    lab = Lab(device)
    k, v = np.float32([[90.0], [-90.0], [300.0]]), np.float32([[1], [2], [3]])
    state = lab.state(np.float32([[[0], [0], [-1e30]]]))
    op = Wkv4(
        receptance=lab.matrix(np.ones((3, 1))), key=lab.matrix(k), value=lab.matrix(v), decay=lab.vector([-1e-3]),
        bonus=lab.vector([0]), starts=lab.starts((3,)), state=state,
    )  # fmt: skip
    y = lab.run(lab.ops.add(op))
    np.testing.assert_allclose(y[:, 0], [1, 1, 3], rtol=1e-6)
    assert np.isfinite(lab.state_after(state)).all()


def head_norm(D: int) -> Norm:
    return Norm(normal(D), normal(D), 64e-5)


def on_device(lab: Lab, norm: Norm) -> Norm:
    return Norm(lab.vector(norm.weight), lab.vector(norm.bias), norm.eps)


@cases("lengths, H, N, varying", with_each(HEADS, True, False), with_each(FEW_HEADS, True, False))
def test_wkv6(device: str, lengths: tuple[int, ...], H: int, N: int, varying: bool) -> None:
    T, lab = sum(lengths), Lab(device)
    r, k, v = (normal(T, H * N) for _ in range(3))
    w = np.exp(-np.exp(RNG.uniform(-8, 1, (T if varying else 1, H * N)))).astype(np.float32)
    u, S = normal(H, N, scale=0.3), normal(len(lengths), H, N, N)
    norm, gate = head_norm(H * N), normal(T, H * N) if varying else None
    want_S, state = S.astype(float), lab.state(S)
    each = [a.reshape(-1, H, N).astype(float) for a in (r, k, v, np.broadcast_to(w, (T, H * N)))]
    want = [naive.wkv6(*(a[i] for a in each), u.astype(float), want_S[b]) for b, i in parts(lengths).items()]
    normed = naive.group_norm(np.concatenate(want).reshape(T, -1), norm.weight, norm.bias, H, norm.eps)
    op = Wkv6(
        receptance=lab.matrix(r), key=lab.matrix(k), value=lab.matrix(v),
        decay=lab.matrix(w) if varying else lab.vector(w), bonus=lab.vector(u), norm=on_device(lab, norm),
        gate=None if gate is None else lab.matrix(gate), starts=lab.starts(lengths), state=state,
    )  # fmt: skip
    check(lab.run(lab.ops.add(op)), normed if gate is None else normed * gate, 1e-5)
    check(lab.state_after(state), want_S)


@cases("lengths, H, N, residual", with_each(HEADS, True, False), with_each(FEW_HEADS, True, False))
def test_wkv7(device: str, lengths: tuple[int, ...], H: int, N: int, residual: bool) -> None:
    T, lab = sum(lengths), Lab(device)
    r, k, v, g, first = (normal(T, H * N) for _ in range(5))
    w = np.exp(-np.exp(-0.5) * RNG.random((T, H * N))).astype(np.float32)
    assert w.min() > 0.545
    a, mix = RNG.random((2, T, H * N)).astype(np.float32)
    k_k, k_a = RNG.uniform(0.6, 1.1, H * N).astype(np.float32), RNG.uniform(0.8, 1.2, H * N).astype(np.float32)
    r_k, norm, S = normal(H, N, scale=0.1), head_norm(H * N), normal(len(lengths), H, N, N)
    state = lab.state(S)
    want_S = S.astype(float).transpose(0, 1, 3, 2).copy()  # the oracle's is [value, key]
    value = v + (first.astype(float) - v) * mix if residual else v.astype(float)
    kk = (k.astype(float) * k_k).reshape(T, H, N)
    kk /= np.sqrt((kk**2).sum(-1, keepdims=True))
    key = k * (1 + (a.astype(float) - 1) * k_a)
    heads = [m.reshape(T, H, N).astype(float) for m in (r, w, key, value)]
    each = [*heads, kk, kk * a.reshape(T, H, N)]
    want = [naive.wkv7(*(m[i] for m in each), want_S[b]) for b, i in parts(lengths).items()]
    normed = naive.group_norm(np.concatenate(want).reshape(T, -1), norm.weight, norm.bias, H, norm.eps)
    normed += ((heads[0] * heads[2] * r_k).sum(-1, keepdims=True) * heads[3]).reshape(T, -1)
    op = Wkv7(
        receptance=lab.matrix(r), decay=lab.matrix(w), key=lab.matrix(k), value=lab.matrix(v), rate=lab.matrix(a),
        gate=lab.matrix(g), residual=ValueResidual(first=lab.matrix(first), gate=lab.matrix(mix)) if residual else None,
        key_scale=lab.vector(k_k), key_rate=lab.vector(k_a), bonus=lab.vector(r_k), norm=on_device(lab, norm),
        starts=lab.starts(lengths), state=state,
    )  # fmt: skip
    check(lab.run(lab.ops.add(op)), normed * g, 1e-5)
    check(lab.state_after(state), want_S.transpose(0, 1, 3, 2), 5e-6)


@each_device
def test_a_zero_key_has_no_direction(device: str) -> None:
    lab, S = Lab(device), normal(1, 2, 4, 4)
    zero, one, state = np.zeros((1, 8), np.float32), np.ones(8, np.float32), lab.state(S)
    nothing = lab.matrix(zero)
    op = Wkv7(
        receptance=nothing, decay=lab.matrix(zero + 1), key=nothing, value=nothing, rate=nothing, gate=nothing,
        residual=None, key_scale=lab.vector(one), key_rate=lab.vector(one), bonus=lab.vector(zero.reshape(2, 4)),
        norm=on_device(lab, head_norm(8)), starts=lab.starts((1,)), state=state,
    )  # fmt: skip
    lab.run(lab.ops.add(op))
    np.testing.assert_array_equal(lab.state_after(state), S)


def looking_back(lab: Lab, name: str, x: Any, starts: Any, state: Any) -> Any:
    """An operation that looks back in time, over rows x [T, 6, 48]."""
    r, k, v, *others = (lab.matrix(each) for each in x.transpose(1, 0, 2))
    vector, bonus, norm = np.linspace(0.1, 1, 48), np.full((2, 24), 0.3), Norm(np.ones(48), np.zeros(48), 64e-5)
    shared = {"starts": starts, "state": state}
    if name == "shift":
        return TokenShift(k, starts, state)
    if name == "wkv4":
        rkv = {"receptance": r, "key": k, "value": v}
        return Wkv4(**rkv, decay=lab.vector(-vector), bonus=lab.vector(vector), **shared)
    shared |= {"receptance": r, "key": k, "value": v, "bonus": lab.vector(bonus), "norm": on_device(lab, norm)}
    w, a, g = others
    if name == "wkv6":
        return Wkv6(decay=w, gate=None, **shared)
    scales = {"key_scale": lab.vector(vector), "key_rate": lab.vector(vector)}
    return Wkv7(decay=w, rate=a, gate=g, residual=None, **scales, **shared)


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("name", ["wkv6", "wkv7"])
def test_a_recurrence_has_the_same_bits_in_each_form(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has a kernel for sequences of few tokens and one for many."""
    needs("numba_cuda", "dev")
    from rwkv_cli.kernels.cuda.device import heads

    lengths, results = (1, 0, 11, 3), []
    x, S = RNG.uniform(0.1, 0.9, (sum(lengths), 6, 48)).astype(np.float32), normal(len(lengths), 2, 24, 24)
    for few in (sum(lengths), 0):
        monkeypatch.setattr(heads, "FEW_TOKENS", few)
        lab = Lab(device)
        state = lab.state(S)
        y = lab.run(lab.ops.add(looking_back(lab, name, x, lab.starts(lengths), state)))
        results.append((y, lab.state_after(state)))
    (few_y, few_S), (many_y, many_S) = results
    np.testing.assert_array_equal(few_y, many_y)
    np.testing.assert_array_equal(few_S, many_S)


@cases("name, shape", [("shift", (48,)), ("wkv4", (3, 48)), ("wkv6", (2, 24, 24)), ("wkv7", (2, 24, 24))], None)
def test_states_between_rows_are_kept(device: str, name: str, shape: tuple[int, ...]) -> None:
    """They are the states that shorter sequences end with, bit for bit. Nothing is kept after a sequence's last row."""
    lengths = (3, 0, 1, 5)
    x, begin = RNG.random((9, 6, 48)).astype(np.float32), RNG.random((4, *shape)).astype(np.float32)

    def run(rows: slice, lengths: tuple[int, ...], begin: Any) -> tuple[Any, Any]:
        """The states after some rows and those kept between them."""
        lab = Lab(device)
        state = lab.keeping(lab.state(begin), sum(lengths))
        lab.run(lab.ops.add(looking_back(lab, name, x[rows], lab.starts(lengths), state)))
        return lab.state_after(state), lab.kept(state)

    _, kept = run(slice(None), lengths, begin)
    for b, rows in parts(lengths).items():
        for t in range(rows.start, rows.stop - 1):
            (after,), _ = run(slice(rows.start, t + 1), (t + 1 - rows.start,), begin[b : b + 1])
            np.testing.assert_array_equal(kept[t], after)
        assert np.isnan(kept[rows.stop - 1]).all()


@cases("dtype, bits, T", with_each([("F32", 24), ("F16", 11), ("BF16", 8)], 1, 3), [("F16", 11, 2), ("BF16", 8, 3)])
def test_round_to(device: str, dtype: str, bits: int, T: int) -> None:
    x = np.concatenate([normal(100), np.float32([1 + 2.0**-bits, 1 + 3 * 2.0**-bits, 0, -1.5])])[None]
    if dtype == "F16":
        edges = np.float32([65519, 65520, -7e4, 2.0**-25, 3 * 2.0**-25])
        x = np.concatenate([x[0], normal(50, scale=1e-5), edges])[None]
        with np.errstate(over="ignore"):
            want = x.astype(np.float16).astype(np.float32)
    else:
        mantissa, exponent = np.frexp(x.astype(float))
        want = np.ldexp(np.rint(mantissa * 2.0**bits) / 2.0**bits, exponent)  # ties to even
    lab = Lab(device)
    value = lab.value(np.roll(np.tile(x, (T, 1)), 1, axis=0))
    lab.ops.add(RoundTo(value, dtype))
    np.testing.assert_array_equal(lab.run(value), np.tile(want, (T, 1)))


def scores(device: str, p: Any, q: Any, targets: Any) -> Any:
    lab = Lab(device)
    left, right = lab.matrix(p), lab.matrix(q)
    nll = lab.ops.add(CrossEntropy(left, lab.ids(targets)))
    return [got[:, 0] for got in lab.run(nll, *lab.ops.add(Divergence(left, right)))]


@cases("V, exact", [(3001, 1e-6)], [(97, 1e-12)])
def test_scores(device: str, V: int, exact: float) -> None:
    """The CPU sums exponentials in float32 by blocks, the GPU all of them in float64."""
    p, q = normal(5, V, scale=6), normal(5, V, scale=6)
    q[1], p[3, 7] = p[1], 1e4
    targets = np.array([0, V - 1, 7, 7, 40])
    lp, lq = naive.log_softmax(p.astype(float)), naive.log_softmax(q.astype(float))
    nll, kl, same = scores(device, p, q, targets)
    np.testing.assert_allclose(nll, -lp[np.arange(5), targets], rtol=exact, atol=exact)
    # not the row with a logit of 1e4, whose q has tokens of no probability in float64
    finite = np.array([0, 1, 2, 4])
    want = (np.exp(lp) * (lp - lq)).sum(-1)[finite]
    np.testing.assert_allclose(kl[finite], want, rtol=max(1e-9, 10 * exact), atol=max(1e-12, 1e-3 * exact))
    np.testing.assert_array_equal(same, p.argmax(-1) == q.argmax(-1))
    assert same[1]
    p[2, 7] = np.nan
    nll, kl, same = scores(device, p, q, targets)
    assert np.isnan(nll).tolist() == [False, False, True, False, False]


@each_device
def test_one_program_serves_every_number_of_rows(device: str) -> None:
    """Compiled once with room for 40 rows, then run with 40, 1, none and 7 of them."""
    N, K = (48, 64) if device == "cpu" else (5, 34)
    stored, w, b = quantize(normal(N, K, scale=0.1)), normal(K), normal(K)
    lab = Lab(device, room=30)
    x = lab.matrix(normal(10, K))
    normed = lab.ops.add(LayerNorm(x, Norm(lab.vector(w), lab.vector(b), 1e-5)))
    (y,) = lab.ops.linear(Product(normed, lab.weight(stored)))
    executable = lab.compile(y)
    for T in (40, 1, 0, 7, 40) if device == "cpu" else (3, 1, 0, 3):
        given = normal(T, K)
        executable.run({x.name: given})
        want = naive.layer_norm(given.astype(float), w, b, 1e-5) @ stored.float32().astype(float).T
        got = executable.read(y)
        assert got.shape == (T, N)
        if T:
            check(got, want, 1e-4)


@each_device
def test_starts_are_read_when_the_program_runs(device: str) -> None:
    """The same program, with the same rows cut into sequences in another way."""
    lab, x, last = Lab(device), normal(6, 40), normal(3, 40)
    starts, state = lab.starts((1, 2, 3)), lab.state(last)
    delta = lab.ops.add(TokenShift(lab.matrix(x), starts, state))
    executable = lab.compile(delta)
    for lengths in ((1, 2, 3), (4, 0, 2), (0, 0, 6), (1, 2, 3)):
        arrays = lab.arrays | {starts.name: begins(lengths)}
        arrays[state.array.name] = lab.backend.device_array(np.tile(last, (3, 1, 1)))
        executable.run(arrays)
        got = executable.read(delta)
        for b, rows in parts(lengths).items():
            check(got[rows], np.vstack([last[b : b + 1], x[rows][:-1]]).astype(float) - x[rows])
