"""The CUDA twin in numba's simulator, against the float64 oracle and the CPU twin; its kernels compiled for GPUs."""

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import tiny
from naive import error_ratio, sigmoid

import rwkv_cli
from rwkv_cli.errors import DeviceError
from rwkv_cli.kernels.contract import Lerp, Norm, Product
from rwkv_cli.kernels.cpu.quantize_weights import quantize_rows
from rwkv_cli.models import State
from rwkv_cli.quant.formats.int8 import quantize

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (rwkv-cli[cuda])", allow_module_level=True)

from rwkv_cli.kernels.cuda import backend as cuda
from rwkv_cli.kernels.cuda import driver as cuda_driver
from rwkv_cli.kernels.cuda import gpus
from rwkv_cli.kernels.cuda import limits as cuda_limits
from rwkv_cli.kernels.cuda import lower as cuda_program
from rwkv_cli.kernels.cuda.array import DeviceArray
from rwkv_cli.kernels.cuda.device.compile import SIMULATED

pytestmark = [
    pytest.mark.skipif(not SIMULATED, reason="NUMBA_ENABLE_CUDASIM=0; benchmarks/gpu.py tests on a GPU"),
    # floats of the simulator are numpy's, which warns where a GPU goes on
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

RNG = np.random.default_rng(0)
_GUARD = 256
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bands around all of the device's memory, which nothing may touch; what is between them begins as NaN."""
    bands: list[Any] = []

    def make(self: Any, size: int) -> None:
        whole = np.full(size + 2 * _GUARD + 16, 0x77, np.uint8)
        skip = -whole.ctypes.data % 16 + _GUARD
        whole[skip : skip + size] = 0xFF
        self.size, self.address, self.host = size, whole.ctypes.data + skip, whole
        bands.append((whole, skip, size))

    monkeypatch.setattr(cuda_driver.Block, "__init__", make)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-4)  # the simulator's threads wait for each other
    yield
    sys.setswitchinterval(interval)
    for whole, skip, size in bands:
        assert (whole[:skip] == 0x77).all()
        assert (whole[skip + size :] == 0x77).all()


def normal(*shape: int, scale: float = 1.0) -> Any:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def uniform(low: float, high: float, *shape: int) -> Any:
    return RNG.uniform(low, high, shape).astype(np.float32)


def check(got: Any, want: Any, limit: float = 2e-6) -> None:
    assert error_ratio(got, want) < limit
    assert np.abs(got - want).max() < 20 * limit * max(1.0, np.abs(want).max())


def put(*arrays: Any) -> list[Any]:
    return [cuda.device_array(array) for array in arrays]


def run(inputs: list[Any], record: Callable[[Any], Any]) -> list[Any]:
    """What a program makes of `inputs`: the arrays that `record`, called with it, returns. The program runs twice on
    copies of the inputs, and once on these."""
    program = cuda.record(inputs, 1)
    outputs = record(program)
    program.run([a.copy() if isinstance(a, DeviceArray) else a for a in inputs])
    program.run(inputs)
    return [program.read(output) for output in outputs]


def begins(lengths: tuple[int, ...]) -> Any:
    return np.cumsum([0, *lengths])


@pytest.mark.parametrize(("T", "D"), [(1, 3), (3, 40), (2, 129)])
def test_layer_norm(T: int, D: int) -> None:
    x, w, b = normal(T, D, scale=30) + 5, normal(D), normal(D)
    dx, dw, db = put(x, w, b)
    (out,) = run([dx], lambda ops: [ops.layer_norm(dx, Norm(dw, db, 1e-5))])
    check(out, naive.layer_norm(x.astype(float), w, b, 1e-5))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("lengths", "D"), [((1,), 5), ((3, 1, 2), 33)])
def test_token_shift(lengths: tuple[int, ...], D: int, normed: bool) -> None:
    B = len(lengths)
    x, w, b, before = normal(sum(lengths), D), normal(D), normal(D), normal(2, B + 2, D)
    dx, dw, db, last = put(x, w, b, before)

    def record(ops: Any) -> Any:
        a = ops.layer_norm(dx, Norm(dw, db, 1e-5)) if normed else dx
        return [a, ops.token_shift(a, begins(lengths), last[1, 1 : B + 1])]

    want = naive.layer_norm(x.astype(float), w, b, 1e-5) if normed else x.astype(float)
    starts = begins(lengths)
    earlier = np.vstack([want[:1], want[:-1]])
    earlier[starts[:-1]] = before[1, 1 : B + 1]
    a, delta = run([dx, last], record)
    check(a, want)
    check(delta, earlier - want)
    after = np.asarray(last)
    check(after[1, 1 : B + 1], want[starts[1:] - 1])
    after[1, 1 : B + 1] = before[1, 1 : B + 1]
    np.testing.assert_array_equal(after, before)  # other layers and sequences


def stored(w: Any, layout: str) -> tuple[Any, Any]:
    """A weight on the device and the matrix that it stands for."""
    q = quantize(w, layout, quantize_rows)
    return cuda.int8_weight(q.layout, q.shape, q.values, q.scales, q.unit), q.float32().astype(float)


@pytest.mark.parametrize("T", [1, 3, 10, 35])
def test_products(T: int) -> None:
    """Several in one launch: both layouts, ragged sizes, a shared and two mixed inputs, every activation, biases."""
    K = 70
    x, delta, row, mix, bias = normal(T, K), normal(T, K), uniform(0, 1, 1, K), uniform(0, 1, T, K), normal(1, 17)
    dx, dd, dr, dm, db = put(x, delta, row, mix, bias)
    (a, wa), (b, wb), (c, wc) = (
        stored(normal(17, K), "tile"),
        stored(normal(48, K), "columns"),
        stored(normal(5, K), "tile"),
    )
    (d, wd), one = stored(normal(17, 48, scale=1e-3), "tile"), Lerp(dx, dd, dr)

    def record(ops: Any) -> Any:
        outs = ops.linear(
            Product(dx, a, "sigmoid", db), Product(dx, b), Product(one, c, "tanh"), Product(one, a, "silu"),
            Product(Lerp(dx, dd, dm), a, "relu_squared"), Product(dx, a, "decay"), Product(dx, a, "soft_decay", db),
        )  # fmt: skip
        ops.add_linear(outs[0], outs[1], d)
        return outs

    x, lerped = x.astype(float), x + delta.astype(float) * row
    p = x @ wa.T
    want = [
        sigmoid(p + bias) + x @ wb.T @ wd.T, x @ wb.T, np.tanh(lerped @ wc.T), lerped @ wa.T * sigmoid(lerped @ wa.T),
        np.maximum((x + delta.astype(float) * mix) @ wa.T, 0) ** 2, np.exp(-np.exp(p)),
        np.exp(-np.exp(-0.5) * sigmoid(p + bias)),
    ]  # fmt: skip
    for have, expected in zip(run([dx], record), want, strict=True):
        check(have, expected, 1e-4)  # 15 bits of activation


def test_a_product_does_not_lose_nan() -> None:
    w, _ = stored(normal(16, 64), "tile")
    for T in (1, 2):
        for bad in (np.nan, np.inf):
            x = np.zeros((T, 64), np.float32)
            x[0, 40] = bad
            (dx,) = put(x)
            (y,) = run([dx], lambda ops, dx=dx: ops.linear(Product(dx, w, "relu_squared")))
            assert np.isnan(y[0]).all()
            assert (y[1:] == 0).all()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_float_products_and_tables(dtype: str) -> None:
    w, table, x, delta, mix = normal(17, 20), normal(6, 11), normal(2, 20), normal(2, 20), uniform(0, 1, 1, 20)
    w, table = (tiny.rounded({"": a}, dtype)[""] for a in (w, table))
    bits = [np.frombuffer(tiny.raw(a, dtype), "<f4" if dtype == "F32" else "<u2").reshape(a.shape) for a in (w, table)]
    weight, rows = (cuda.float_weight(dtype, a) for a in bits)
    (dx, dd, dm), ids = put(x, delta, mix), np.array([5, 0, 3])

    def record(ops: Any) -> Any:
        e = ops.embed(ids, rows)
        ops.round_to(e, "BF16" if dtype == "F32" else "F16")
        return [*ops.linear(Product(Lerp(dx, dd, dm), weight, "sigmoid")), e, ops.take(e, np.array([2, 0]))]

    y, e, taken = run([ids], record)
    check(y, sigmoid((x + delta.astype(float) * mix) @ w.T.astype(float)))
    want = table[ids]
    if dtype == "F32":
        raw = want.view(np.uint32)
        want = ((raw + (0x7FFF + ((raw >> 16) & 1))) & 0xFFFF0000).view(np.float32)
    else:
        want = want.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(e, want)
    np.testing.assert_array_equal(taken, want[[2, 0]])


def test_an_int8_table() -> None:
    q = quantize(normal(7, 45), "rows", quantize_rows)
    table, ids = cuda.int8_weight(q.layout, q.shape, q.values, q.scales, q.unit), np.array([6, 6, 1])
    (e,) = run([ids], lambda ops: [ops.embed(ids, table)])
    check(e, q.float32()[ids], 1e-7)


def test_gates_and_splits() -> None:
    x, y, gate = normal(3, 37), normal(3, 37), normal(3, 37)
    dx, dy, dg, one, zero = put(x, y, gate, np.ones(37), np.zeros(37))
    norm, ones, zeros = Norm(one, zero, 1e-5), np.float64(1), np.float64(0)
    want = naive.layer_norm(x.astype(float), ones, zeros, 1e-5) + y.astype(float) * gate
    w, full = stored(normal(16, 12), "tile")

    def record(ops: Any) -> Any:
        out, parts = ops.layer_norm(dx, norm), ops.split(dy[:, :36], 3)
        ops.add_gated(out, dy, dg)
        return [out, *ops.linear(*(Product(part, w) for part in parts))]

    got, *products = run([dx], record)
    check(got, want)
    for part, product in zip(np.split(y[:, :36], 3, axis=1), products, strict=True):
        check(product, part @ full.T, 1e-4)


@pytest.mark.parametrize("lengths", [(1,), (4, 1)])
def test_wkv4(lengths: tuple[int, ...]) -> None:
    T, D, B = sum(lengths), 67, len(lengths)
    r, k, v, u = uniform(0, 1, T, D), normal(T, D, scale=2), normal(T, D), normal(D, scale=0.5)
    k[0, 0] = 200.0  # e^k would overflow
    w = -np.exp(uniform(-6, 2, D))
    start = np.tile(np.float32([[0], [0], [-1e30]]), (B, 1, D))
    *arrays, state = put(r, k, v, w, u, start)
    (y,) = run([state], lambda ops: [ops.wkv4(*arrays, begins(lengths), state)])
    S = np.asarray(state).astype(float)
    for b, (at, end) in enumerate(zip(begins(lengths), begins(lengths)[1:], strict=False)):
        a, c = np.zeros(D), np.zeros(D)
        part = slice(at, end)
        check(
            y[part], r[part] * naive.wkv4(k[part].astype(float), v[part].astype(float), w.astype(float), u, a, c), 5e-6
        )
        check((S[b, 0] / S[b, 1])[1:], (a / c)[1:], 2e-5)


HEADS = [((1,), 1, 8), ((2, 1), 2, 16), ((3,), 1, 6)]


@pytest.mark.parametrize(("lengths", "H", "N"), HEADS)
@pytest.mark.parametrize("varying", [True, False])
def test_wkv6(lengths: tuple[int, ...], H: int, N: int, varying: bool) -> None:
    T, B = sum(lengths), len(lengths)
    r, k, v, gate = (normal(T, H * N) for _ in range(4))
    w = np.exp(-np.exp(uniform(-8, 1, T if varying else 1, H * N)))
    u, weight, bias, before = normal(H, N, scale=0.3), normal(H * N), normal(H * N), normal(2, B + 2, H, N, N)
    *arrays, dw, db, dg, state = put(r, k, v, w, u, weight, bias, gate, before)
    norm, part = Norm(dw, db, 64e-5), state[1, 1 : B + 1]

    def record(ops: Any) -> Any:
        return [ops.wkv6(*arrays, norm, dg if varying else None, begins(lengths), part)]

    (y,) = run([state], record)
    S = before[1, 1 : B + 1].astype(float)
    heads = [a.reshape(-1, H, N).astype(float) for a in (r, k, v, np.broadcast_to(w, (T, H * N)))]
    want = np.concatenate([
        naive.wkv6(*(a[i] for a in heads), u.astype(float), S[b])
        for b, i in enumerate(slice(a, e) for a, e in zip(begins(lengths), begins(lengths)[1:], strict=False))
    ]).reshape(T, -1)  # fmt: skip
    want = naive.group_norm(want, weight, bias, H, 64e-5)
    check(y, want * gate if varying else want, 1e-5)
    after = np.asarray(state)
    check(after[1, 1 : B + 1], S)
    after[1, 1 : B + 1] = before[1, 1 : B + 1]
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(("lengths", "H", "N"), HEADS)
def test_wkv7(lengths: tuple[int, ...], H: int, N: int) -> None:
    T, B, D = sum(lengths), len(lengths), H * N
    r, k, v, g, first = (normal(T, D) for _ in range(5))
    w, a, mix = uniform(0.545, 1, T, D), uniform(0, 1, T, D), uniform(0, 1, T, D)
    k_k, k_a, r_k = uniform(0.6, 1.1, D), uniform(0.8, 1.2, D), normal(H, N, scale=0.3)
    weight, bias, before = normal(D), normal(D), normal(1, B, H, N, N)
    residual = B > 1
    *arrays, df, dm, dk, da, dr, dw, db, state = put(r, w, k, v, a, g, first, mix, k_k, k_a, r_k, weight, bias, before)

    def record(ops: Any) -> Any:
        pair = (df, dm) if residual else None
        return [ops.wkv7(*arrays, pair, dk, da, dr, Norm(dw, db, 64e-5), begins(lengths), state[0])]

    (y,) = run([state], record)
    kk = (k.astype(float) * k_k).reshape(T, H, N)
    kk /= np.sqrt((kk**2).sum(-1, keepdims=True))
    key = k * (1 + (a.astype(float) - 1) * k_a)
    value = v + (first - v.astype(float)) * mix if residual else v.astype(float)
    heads = [m.reshape(T, H, N).astype(float) for m in (r, w, key, value)]
    parts = [*heads, kk, kk * a.reshape(T, H, N)]
    S = before[0].transpose(0, 1, 3, 2).astype(float)
    want = np.concatenate([
        naive.wkv7(*(m[i] for m in parts), S[b])
        for b, i in enumerate(slice(s, e) for s, e in zip(begins(lengths), begins(lengths)[1:], strict=False))
    ]).reshape(T, -1)  # fmt: skip
    want = naive.group_norm(want, weight, bias, H, 64e-5)
    want += ((heads[0] * heads[2] * r_k).sum(-1, keepdims=True) * heads[3]).reshape(T, -1)
    check(y, want * g, 1e-5)
    check(np.asarray(state)[0], S.transpose(0, 1, 3, 2))


@pytest.mark.parametrize("T", [1, 3])
def test_levels_are_put_by_who_makes_an_activation(T: int) -> None:
    """Then they are not rounded again; of what was changed since, they are."""
    H, N, K = 2, 32, 64
    r, k, v, x = (normal(T, K) for _ in range(4))
    w, u, one, zero = uniform(0.5, 1, 1, K), normal(H, N), np.ones(K, np.float32), np.zeros(K, np.float32)
    *arrays, do, dz, dx, state = put(r, k, v, w, u, one, zero, x, np.zeros((1, H, N, N), np.float32))
    (a, wa), (b, wb), starts = stored(normal(40, K), "tile"), stored(normal(17, 40), "tile"), np.array([0, T])
    launched: list[Any] = []

    def record(ops: Any) -> Any:
        y = ops.wkv6(*arrays, Norm(do, dz, 1e-5), None, starts, state)
        (p,) = ops.linear(Product(y, a, "relu_squared"))
        (q,) = ops.linear(Product(p, b))
        ops.add_gated(y, dx, dx)
        launched.extend(launch.kernel.name for launch in ops._launches)
        return [y, p, q, *ops.linear(Product(y, a))]

    y, p, q, again = run([state], record)
    changed = y.astype(float)
    y = changed - x.astype(float) ** 2
    check(p, np.maximum(y @ wa.T, 0) ** 2, 1e-4)
    check(q, p.astype(float) @ wb.T, 1e-4)
    check(again, changed @ wa.T, 1e-4)
    assert launched.count("quantize") == (0 if T == 1 else 1)


def test_scores() -> None:
    p, q, targets = normal(3, 97, scale=5), normal(3, 97, scale=5), np.array([0, 96, 40])
    q[0], p[1, 3] = p[0], 1e4
    inputs = [p, q, targets]

    def record(ops: Any) -> Any:
        return [ops.cross_entropy(p, targets), *ops.divergence(p, q)]

    nll, kl, same = run(inputs, record)
    log_p, log_q = (naive.log_softmax(a.astype(float)) for a in (p, q))
    np.testing.assert_allclose(nll, -log_p[np.arange(3), targets], rtol=1e-12)
    np.testing.assert_allclose(kl, (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(same, p.argmax(-1) == q.argmax(-1))


def test_what_limits_are_measured_with() -> None:
    out = cuda_driver.Block(4 * 32)
    cuda_limits.multiply.dispatcher[1, 32](out.address, 0)
    assert (np.frombuffer((ctypes.c_int32 * 32).from_address(out.address), np.int32) == 0).all()
    assert cuda.read_bandwidth(1, 1) > 1e6
    assert cuda.int8_peak(1) is None


def test_arrays_have_numpys_manners() -> None:
    host = normal(4, 3, 5)
    array = cuda.device_array(host)
    assert cuda.device_array(array) is array
    for view in (np.s_[1], np.s_[:, 1], np.s_[2, 1:3], np.s_[:, None], np.s_[-1, 2, 1:]):
        np.testing.assert_array_equal(np.asarray(array[view]), host[view])
        assert array[view].flags.c_contiguous == host[view].flags.c_contiguous
        np.testing.assert_array_equal(np.asarray(array[view].copy()), host[view])
        assert array[view].tobytes() == host[view].tobytes()
    array[:, 1] = host[:, 1] = 7
    array[3] = host[3] = normal(3, 5)
    np.testing.assert_array_equal(np.asarray(array), host)
    both = np.stack([array, host], axis=1)
    assert isinstance(both, DeviceArray)
    np.testing.assert_array_equal(np.asarray(both), np.stack([host, host], axis=1))
    assert np.array_equal(array, host)
    for wrong in (np.s_[4], np.s_[::2]):
        with pytest.raises(IndexError):
            array[wrong]


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_the_gpu_benchmark_makes_sound_models(version: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    gpu = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = gpu
    spec.loader.exec_module(gpu)
    ranks = {"6": {"mix": 8, "decay": 8}, "7": {"w": 8, "a": 8, "v": 8, "g": 8}}.get(version, {})
    gpu.write_model(tmp_path / "model", gpu.config_of(version, 2, 32, 16, 64, ranks))
    logits, _ = rwkv_cli.load(tmp_path / "model").forward([1, 2, 3])
    assert 0.1 < logits.std() < 10


IDS = [3, 7]
SIZES = {"layers": 2, "width": 32, "vocab": 40, "head": 16, "ffn": 64}


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_a_model_is_the_cpus(converted: Any, version: str, tmp_path: Path) -> None:
    path = converted(version, **SIZES)
    gpu, cpu = rwkv_cli.load(path, device="cuda"), rwkv_cli.load(path)
    got, state = gpu.forward(IDS, all_logits=True)
    want, expected = cpu.forward(IDS, all_logits=True)
    assert error_ratio(got, want) < 1e-4
    assert all(isinstance(array, DeviceArray) for array in state.arrays().values())
    # on the device a state is changed in place; a clone, a stacked and a loaded one are its own
    state.save(tmp_path / "state")
    kept, loaded = state.clone(), State.load(tmp_path / "state", like=gpu.new_state())
    one = gpu.advance([5], state)
    assert error_ratio(one, cpu.advance([5], expected)) < 1e-4
    for name, array in state.arrays().items():
        assert error_ratio(np.asarray(array), expected.arrays()[name]) < 1e-4
        assert not np.array_equal(np.asarray(array), np.asarray(kept.arrays()[name]))
    if version == "7":
        np.testing.assert_array_equal(gpu.advance([5], loaded), one)
        batch = State.stack([kept, gpu.new_state()])
        np.testing.assert_array_less(error_ratio(gpu.advance_batch([[5], IDS], batch), [one, got[-1]]), 1e-4)
        row = batch.row(0).clone()
        assert error_ratio(np.asarray(row.wkv), np.asarray(state.wkv)) < 1e-4


def test_a_float_model_is_the_oracles(converted: Any) -> None:
    sizes = SIZES | {"layers": 1, "width": 16, "ffn": 32, "vocab": 20}
    got, _ = rwkv_cli.load(converted("5.2", "none", **sizes), device="cuda").forward([3])
    assert error_ratio(got, naive.Naive("5.2", tiny.weights("5.2", **sizes)).forward([3])[-1]) < 1e-5


def test_a_command_runs_on_the_gpu(converted: Any, rwkv: Any, tmp_path: Path) -> None:
    path = converted("4", vocab=256, layers=1, width=32, ffn=32)
    (tmp_path / "text").write_text("ab")
    scores = [
        json.loads(rwkv("ppl", tmp_path / "text", "-m", path, "--device", device, "--json").stdout)
        for device in ("cpu", "cuda")
    ]
    assert scores[0]["nll"] == pytest.approx(scores[1]["nll"], abs=1e-4)


def test_auto_takes_no_simulated_gpu(converted: Any, rwkv: Any) -> None:
    result = rwkv("generate", "a", "-m", converted("7", vocab=256), "--max-tokens", 1, "--device", "auto")
    assert "Running on the CPU." in result.stderr


class Driver:
    """A driver with one GPU, as far as it is asked; `memory` bytes, `free` of them free."""

    CUDA_VERSION = 13050

    def __init__(self, **facts: Any) -> None:
        from cuda.bindings import driver

        self.real = driver
        self.facts = {"count": 1, "version": 13000, "capability": (9, 0), "memory": 80 << 30} | facts
        self.calls: list[str] = []
        self.held: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu") or name[2:3].islower():
            return getattr(self.real, name)

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            return (self.facts.get("status", self.real.CUresult.CUDA_SUCCESS), *self.answer(name, *arguments))

        return call

    def answer(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        if name == "cuMemAlloc":
            memory = np.full(arguments[0] + 16, 0xFF, np.uint8)
            address = -(-memory.ctypes.data // 16) * 16
            self.held[address] = memory
            return (address,)
        if name == "cuMemFree":
            del self.held[arguments[0]]
        if name.startswith("cuMemcpy"):
            ctypes.memmove(*arguments[:3])
        minor = arguments[:1] == (self.real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,)
        return {
            "cuDriverGetVersion": (self.facts["version"],), "cuDeviceGetCount": (self.facts["count"],),
            "cuDeviceGet": (0,), "cuDeviceGetAttribute": (self.facts["capability"][minor],),
            "cuDeviceGetName": (b"NVIDIA Test\0\0",), "cuDeviceTotalMem": (self.facts["memory"],),
            "cuStreamEndCapture": ("graph",), "cuGraphInstantiate": ("executable",),
        }.get(name, ())  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "size", "message"),
    [
        ({"count": 0}, 0, "the NVIDIA driver finds no GPU"),
        ({"version": 12040}, 0, r"for CUDA 12.4, the installed packages for CUDA 13: .*cuda12"),
        ({"capability": (7, 0)}, 0, r"NVIDIA Test has compute capability 7.0, 7.5 is the least"),
        ({}, 9 << 30, r"NVIDIA Test has 8.0 GB of its 85.9 GB free, the model needs 10.2 GB: use --device cpu"),
        ({}, 1 << 30, None),
    ],
)
def test_a_gpu_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, rwkv: Any, facts: dict[str, Any], size: int, message: str | None
) -> None:
    fake = Driver(**facts)
    monkeypatch.setattr("cuda.bindings.driver", fake)
    monkeypatch.setattr("rwkv_cli.kernels.cuda.device.compile.SIMULATED", False)
    monkeypatch.setattr(gpus, "free_memory", lambda: 8_000_000_000)
    if message is None:
        gpus.require(size, simulated=True)
        listed = json.loads(rwkv("info", "--devices", "--json").stdout)
        assert listed["cuda"] == [{"name": "NVIDIA Test", "memory": 80 << 30, "compute_capability": "9.0"}]
        assert "NVIDIA Test, 85.9 GB, compute capability 9.0" in rwkv("info", "--devices").stdout
    else:
        with pytest.raises(DeviceError, match=message):
            gpus.require(size, simulated=True)


def test_a_machine_without_a_driver(converted: Any) -> None:
    """One sentence, and what to do."""
    command = [
        sys.executable,
        "-m",
        "rwkv_cli",
        "generate",
        "a",
        "--device",
        "cuda",
        "-m",
        str(converted("7", vocab=256)),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd="/", env=os.environ | {"NUMBA_ENABLE_CUDASIM": "0"}
    )
    if "NVIDIA driver" not in done.stderr:
        pytest.skip("this machine has a GPU")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: device cuda: there is no NVIDIA driver on this machine: ")


def test_programs_become_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of the driver, on a false one whose memory is the host's: copies, capture in the second run, replay."""
    fake = Driver()
    monkeypatch.undo()  # the guards: memory is the driver's here
    monkeypatch.setattr(cuda_driver, "driver", fake)
    monkeypatch.setattr(cuda_driver, "_streams", lambda: (0, 1))
    for module in (cuda_driver, cuda_program):
        monkeypatch.setattr(module, "SIMULATED", False)
    host = normal(2, 5)
    x = cuda.device_array(host)
    program = cuda.record([x], 1)
    program.round_to(x, "F16")
    for _ in range(3):
        program.run([x])
    np.testing.assert_array_equal(program.read(x), host.astype(np.float16))
    assert fake.calls.count("cuGraphLaunch") == 2
    assert fake.calls.count("cuStreamBeginCapture") == fake.calls.count("cuGraphInstantiate") == 1
    fake.facts["status"] = fake.real.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(DeviceError, match="no memory left"):
        cuda_driver.Block(1)
    fake.facts["status"] = fake.real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        cuda_driver.synchronize()
    fake.facts["status"] = fake.real.CUresult.CUDA_SUCCESS
    held = len(fake.held)
    del x, program
    assert len(fake.held) < held


@pytest.mark.parametrize("capability", ["7.5", "8.0", "9.0"])
def test_every_kernel_compiles(capability: str) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "compile_cuda.py"), capability],
        capture_output=True, text=True, env=os.environ | {"NUMBA_ENABLE_CUDASIM": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) > 20
    for name, facts in kernels.items():
        assert (facts["depot"], facts["stack"], facts["spills"]) == (False, 0, 0), name
        assert facts["shared"] <= 48 << 10, name
        assert facts["registers"] * facts["threads"] <= 1 << 16, name
    shape = "m8n8k16" if capability == "7.5" else "m16n8k32"
    assert kernels["matvec"]["products"]["dp4a.s32.s32"] >= 8
    assert all(facts["products"][shape] for name, facts in kernels.items() if name.startswith("matmul "))
