"""The GPU as a device, simulated or real (NUMBA_ENABLE_CUDASIM=0): programs, models, compiling."""

import ctypes
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import tiny
from false_driver import Driver
from lab import REAL_GPU, guarded_gpu, normal, quantize
from naive import error_ratio

import rwkv_cli
from rwkv_cli.errors import DeviceError
from rwkv_cli.kernels import program as p
from rwkv_cli.models import State

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (rwkv-cli[cuda])", allow_module_level=True)

from rwkv_cli.kernels.cuda import backend as cuda
from rwkv_cli.kernels.cuda import driver as cuda_driver
from rwkv_cli.kernels.cuda import gpus
from rwkv_cli.kernels.cuda import limits as cuda_limits
from rwkv_cli.kernels.cuda.array import DeviceArray
from rwkv_cli.kernels.cuda.device import elementwise, matmul, norms
from rwkv_cli.kernels.cuda.device.compile import SIMULATED
from rwkv_cli.kernels.cuda.launches import AddressOf, Blocks, Launches, Place, Table

# Floats of the simulator are numpy's, which warns where a GPU goes on.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
simulated = pytest.mark.skipif(not SIMULATED, reason="NUMBA_ENABLE_CUDASIM=0: this is a real GPU")

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "kernels" / "cuda").rglob("*.py"))


@pytest.fixture(autouse=True)
def _guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with guarded_gpu(monkeypatch):
        yield


def test_one_program_serves_all_numbers_of_rows() -> None:
    """Each gives the bits that a program for so many rows gives. With no rows at the end, nothing happens there."""
    D, V = 32, 40
    one, zero, x = cuda.vector(np.ones(D, np.float32)), cuda.vector(np.zeros(D, np.float32)), normal(12, D)
    a, b, c = (cuda.weight(quantize(normal(N, K))) for N, K in ((24, D), (D, 24), (V, D)))
    norm = p.Norm(one, zero, 1e-5)

    def write(most: int) -> tuple[p.Program, p.Value]:
        rows, starts = p.Count(most), p.Input("starts", (3,), "I64")
        last, ends = p.Input("last", (1, 2, D)), p.Input("ends", (p.Count(min(most, 2)),), "I64")
        given = p.InputMatrix(rows, D, name="x")
        ops = p.Program(starts, last, ends, given)
        y = ops.add(p.LayerNorm(given, norm))
        delta = ops.add(p.TokenShift(y, starts, p.LayerState(last, 0)))
        (hidden,) = ops.linear(p.Product(p.Lerp(y, delta, one), a, "relu_squared"))
        ops.add(p.AddLinear(y, hidden, b))
        (logits,) = ops.linear(p.Product(ops.add(p.TakeRows(y, ends)), c))
        return ops, ops.keep(logits)

    ops, output = write(12)
    program = cuda.compile(ops, 1)
    for starts, ends in (([0, 12, 12], [11]), ([0, 1, 1], []), ([0, 0, 1], [0]), ([0, 4, 9], [3, 8]), ([0, 3, 3], [2])):
        rows = starts[-1]
        want_ops, want_output = write(rows)
        want = cuda.compile(want_ops, 1)
        results = []
        for executable, value in ((program, output), (want, want_output), (program, output)):
            last = cuda.device_array(np.ones((1, 2, D)))
            executable.run({"x": x[:rows], "starts": np.array(starts), "ends": np.array(ends, int), "last": last})
            results.append((executable.read(value), np.asarray(last)))
        for got, state in results:
            assert got.shape == (len(ends), V)
            assert np.isfinite(got).all()
            np.testing.assert_array_equal(got, results[1][0])
            np.testing.assert_array_equal(state, results[1][1])


def test_a_launch_names_its_kernels_arguments() -> None:
    launches, rows = Launches(), p.Count(3)
    x, blocks = launches.buffer(12), Blocks((1,), 32)
    with pytest.raises(TypeError, match="add_gated takes x, y, gate, D, not x, y, gate"):
        launches.add(elementwise.add_gated, blocks, x=x, y=x, gate=x)
    with pytest.raises(TypeError, match="add_gated: D must be given as int, not as float"):
        launches.add(elementwise.add_gated, blocks, x=x, y=x, gate=x, D=1.0)
    with pytest.raises(TypeError, match="add_gated: y must be given as address, not as Count"):
        launches.add(elementwise.add_gated, blocks, x=x, y=rows, gate=x, D=1)
    state = AddressOf(p.Input("state", (1, 1, 1)))
    with pytest.raises(TypeError, match="shift: last must be given as slot, not as Place"):
        launches.add(norms.shift, blocks, x=x, delta=x, starts=x, last=x, last_offset=0, B=1, D=1)
    launches.add(norms.shift, blocks, x=x, delta=x, starts=x, last=state, last_offset=0, B=1, D=1)
    row = matmul.ProductRow(x, x, 1, 1, x, x, 1.0, None, None, 0, False, x, 1, 1, None, None, 0)
    launches.add(matmul.matvec(8, 2), blocks, table=Table((row, row)))
    with pytest.raises(TypeError, match="ProductRow: unit must be given as float, not as int"):
        launches.add(matmul.matvec(8, 2), blocks, table=Table((row, row._replace(unit=1))))
    assert len(launches.all) == 2


def test_a_buffer_lives_from_its_first_to_its_last_launch() -> None:
    launches, blocks = Launches(), Blocks((1,), 32)
    x, y, z, kept = (launches.buffer(12) for _ in range(4))
    launches.add(elementwise.take, blocks, x=x, rows=x, out=Place(y.base, 4), D=1)
    row = matmul.ProductRow(y, y, 1, 1, y, y, 1.0, None, None, 0, False, kept, 1, 1, None, None, 0)
    launches.add(matmul.matvec(8, 2), blocks, table=Table((row,)))
    launches.add(elementwise.add_gated, blocks, x=z, y=z, gate=z, D=1)
    launches.keep(kept)
    assert [(b.first, b.last) for b in launches.buffers] == [(1, 1), (1, 2), (3, 3), (2, 3)]


@simulated
def test_what_limits_are_measured_with() -> None:
    out = cuda_driver.Block(4 * 32)
    sums = np.frombuffer((ctypes.c_int32 * 32).from_address(out.address), np.int32)
    totals = []
    for rounds in (0, 1, 3):
        cuda_limits.multiply.dispatcher[1, 32](out.address, rounds)
        totals.append(sums.astype(np.int64))
    nothing, once, thrice = totals
    assert (nothing == 0).all()
    assert once.any()
    assert (thrice == 3 * once).all()
    assert cuda.read_bandwidth(1, 1) > 1e6
    assert cuda.product_peak(1) is None


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


@pytest.mark.parametrize(
    ("version", "quant"), [*zip(tiny.VERSIONS, ("int8", "q6", "q5", "q4") * 2, strict=True), ("7", "none")]
)
def test_the_gpu_benchmark_makes_sound_models(
    version: str, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    random = importlib.import_module("random_models")
    random.write_model(tmp_path / "model", random.config_of(version, 2, 32, 16, 64, random.ranks_of(version, 8)), quant)
    logits, _ = rwkv_cli.load(tmp_path / "model").forward([1, 2, 3])
    assert 0.1 < logits.std() < 10


IDS = [3, 7]
SIZES = {"layers": 2, "width": 32, "vocab": 40, "head": 16, "ffn": 64}


@pytest.mark.parametrize(("version", "quant"), [*((version, "int8") for version in tiny.VERSIONS), ("4", "q4")])
def test_a_model_is_the_cpus(converted: Any, version: str, quant: str, tmp_path: Path) -> None:
    """Logits and states agree, but for values between two levels of 8 bits, which may fall to either side."""
    limit = 1e-2 if REAL_GPU else 1e-3  # whose sums come in another order
    path = converted(version, quant, **SIZES)
    gpu, cpu = rwkv_cli.load(path, device="cuda"), rwkv_cli.load(path)
    got, state = gpu.forward(IDS, all_logits=True)
    want, expected = cpu.forward(IDS, all_logits=True)
    assert error_ratio(got, want) < limit
    assert all(isinstance(array, DeviceArray) for array in state.arrays().values())
    # on the device a state is changed in place; a clone, a stacked and a loaded one are its own
    state.save(tmp_path / "state")
    kept, loaded = state.clone(), State.load(tmp_path / "state", like=gpu.new_state())
    one = gpu.advance([5], state)
    assert error_ratio(one, cpu.advance([5], expected)) < limit
    for name, array in state.arrays().items():
        assert error_ratio(np.asarray(array), expected.arrays()[name]) < limit
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


@simulated
def test_auto_takes_no_simulated_gpu(converted: Any, rwkv: Any) -> None:
    result = rwkv("generate", "a", "-m", converted("7", vocab=256), "--max-tokens", 1, "--device", "auto")
    assert "Running on the CPU." in result.stderr


@simulated
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


def compiled(*arguments: str) -> dict[str, Any]:
    """The object that `compile_cuda.py` prints."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "compile_cuda.py"), *arguments],
        capture_output=True, text=True, env=os.environ | {"NUMBA_ENABLE_CUDASIM": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_process_finds_the_kernels_that_another_has_compiled() -> None:
    assert compiled("9.0", "--keys") == compiled("9.0", "--keys")


@pytest.mark.parametrize("capabilities", [["7.5", "8.0"], ["9.0"]], ids=" ".join)
def test_every_kernel_compiles(capabilities: list[str]) -> None:
    found = compiled(*capabilities)
    announced = found.pop("announced")
    assert announced == 1  # a person is told that kernels are compiled
    assert list(found) == capabilities
    text = "".join(path.read_text() for path in SOURCES)
    for capability, kernels in found.items():
        for name in re.findall(r"@kernel\(.*\)\n *def (\w+)", text):
            assert any(each.split()[0] == name for each in kernels), f"{name} was not compiled"
        for name, facts in kernels.items():
            assert (facts["depot"], facts["stack"], facts["spills"]) == (False, 0, 0), name
            assert facts["shared"] <= 48 << 10, name
            assert facts["registers"] * facts["threads"] <= 1 << 16, name

        def least(name: str, start: str, kernels: Any = kernels) -> int:
            """How often an instruction is in each of the kernels whose name begins so, at least."""
            return min(facts["instructions"][name] for each, facts in kernels.items() if each.startswith(start))

        assert least("dp4a.s32.s32", "matvec ") >= 8
        assert least("m8n8k16" if capability == "7.5" else "m16n8k32", "matmul ") >= 1
        assert (least("cp.async.cg", "matmul_half ") >= 1) == (capability != "7.5")
        # Two sums of two numbers, each of a warp and then of all warps, in five steps, none of which is in a loop.
        assert least("shfl.sync", "layer_norm ") == 40
