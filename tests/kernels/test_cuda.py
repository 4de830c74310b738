"""The GPU as a device, simulated or real (NUMBA_ENABLE_CUDASIM=0): programs, models, the driver, compiling."""

import ctypes
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import tiny
from false_driver import Driver, use_false_driver
from lab import REAL_GPU, guarded_gpu, normal, quantize
from naive import error_ratio

import rwkv_cli
from rwkv_cli.errors import DeviceError
from rwkv_cli.kernels import program as p
from rwkv_cli.models import State
from rwkv_cli.quant.formats import Floats

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (rwkv-cli[cuda])", allow_module_level=True)

from rwkv_cli.kernels.cuda import backend as cuda
from rwkv_cli.kernels.cuda import driver as cuda_driver
from rwkv_cli.kernels.cuda import executable as cuda_executable
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
    """It is so but for values between two levels of 8 bits, which float rounding may bring to either side."""
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


@simulated
def test_programs_become_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of the driver, on a false one whose memory is the host's: copies, capture in the second run, replay."""
    fake = use_false_driver(monkeypatch)
    table = normal(6, 5)
    weight = cuda.weight(Floats("float", "F32", table))
    rows = p.Count(12)
    ids = p.Input("ids", (rows,), "I64")
    ops = p.Program(ids)
    embedded = ops.add(p.Embed(ids, weight))
    ops.add(p.RoundTo(embedded, "F16"))
    ops.keep(embedded)
    programs = [cuda.compile(ops, 1)]

    def run(length: int, times: int) -> bool:
        """Run it so many times; whether the last time it was a graph."""
        (program,) = programs
        for _ in range(times):
            wanted = (
                np.arange(length) % 6
            )  # what a run leaves is right for the next, which the false driver only counts
            program.run({"ids": wanted})
            got = program.read(embedded)
            np.testing.assert_array_equal(got, table[wanted].astype(np.float16).astype(np.float32))
        return program.is_graph

    def captured() -> int:
        (begun, made) = (fake.calls.count(name) for name in ("cuStreamBeginCapture", "cuGraphInstantiate"))
        assert begun == made
        return begun

    assert run(2, 3)
    assert captured() == 1
    assert fake.calls.count("cuGraphLaunch") == 2
    assert not run(1, 1)
    assert run(1, 2)
    assert run(2, 1)  # the graph of this length is still there
    assert captured() == 2
    for length in range(3, 12):
        assert run(length, 2)
    assert captured() == 11
    assert fake.calls.count("cuGraphExecDestroy") == 3  # of those that were used longest ago
    assert not run(2, 1)

    fake.facts["status"] = fake.real.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(DeviceError, match="no memory left"):
        cuda_driver.Block(1)
    fake.facts["status"] = fake.real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        cuda_driver.synchronize()
    fake.facts["status"] = fake.real.CUresult.CUDA_SUCCESS
    held = len(fake.held)
    programs.clear()
    assert len(fake.held) < held


@pytest.fixture
def false_driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return use_false_driver(monkeypatch)


@simulated
@pytest.mark.parametrize(("least", "overlaps"), [((5, 0), True), ((9, 0), False)])
def test_launches_of_a_graph_overlap_where_kernels_wait(
    false_driver: Driver, monkeypatch: pytest.MonkeyPatch, least: tuple[int, int], overlaps: bool
) -> None:
    """The simulated GPU has compute capability 5.2. Edges are taken out as they are, and put back as early ones."""
    monkeypatch.setattr(cuda_driver, "_OVERLAPS", least)
    given: dict[str, Any] = {}
    answer = false_driver.answer

    def keep(name: str, *arguments: Any) -> Any:
        given[name] = arguments
        return answer(name, *arguments)

    monkeypatch.setattr(false_driver, "answer", keep)
    cuda_driver.Graph(lambda _: None)
    assert ("cuGraphAddDependencies" in given) == overlaps
    if overlaps:
        assert given["cuGraphRemoveDependencies"] == ("graph", ["a", "b"], ["b", "c"], ["plain"] * 2, 2)
        graph, before, after, edges, count = given["cuGraphAddDependencies"]
        assert (graph, before, after, count) == ("graph", ["a", "b"], ["b", "c"], 2)
        assert [(edge.from_port, edge.to_port, edge.type) for edge in edges] == [(1, 0, 1)] * 2  # programmatic


def run_of(launch: Any) -> Any:
    """The launches of a run, of which `launch` is the only one."""
    bound = cuda_executable.BoundLaunches([], {})
    bound._launch = launch  # type: ignore[method-assign]
    return bound


@simulated
def test_a_capture_that_is_interrupted_is_ended_and_tried_again(false_driver: Driver) -> None:
    faults: list[BaseException | None] = [None, KeyboardInterrupt(), None]

    def launch(on: Any) -> None:
        assert gc.isenabled() == (on == 0)  # not while stream 1 captures
        fault = faults.pop(0)
        if fault is not None:
            raise fault

    bound = run_of(launch)
    bound.run()
    with pytest.raises(KeyboardInterrupt):
        bound.run()
    assert gc.isenabled()
    assert false_driver.calls.count("cuStreamEndCapture") == false_driver.calls.count("cuGraphDestroy") == 1
    bound.run()
    assert bound.graph is not None


@simulated
def test_a_token_costs_four_calls_of_the_driver(false_driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a copy each way, the graph, and waiting for it; numba is asked nothing."""
    ids = p.Input("ids", (p.Count(2),), "I64")
    ops = p.Program(ids)
    output = ops.keep(ops.add(p.Embed(ids, cuda.weight(Floats("float", "F32", normal(6, 5))))))
    program, kept = cuda.compile(ops, 1), list[Any]()

    def token() -> None:
        program.run({"ids": np.array([3, 4])})
        kept[:] = [*kept[-1:], program.read(output)]

    for _ in range(3):
        token()
    false_driver.calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(cuda_driver, "cuda", None)
        token()
    assert false_driver.calls == ["cuMemcpyHtoDAsync", "cuGraphLaunch", "cuMemcpyDtoHAsync", "cuStreamSynchronize"]


@simulated
def test_a_thread_gets_a_context_before_it_copies_or_frees(
    false_driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that has not used the GPU yet may be the one that drops the last reference to memory."""
    order: list[str] = []
    answer = false_driver.answer
    monkeypatch.setattr(false_driver, "answer", lambda name, *rest: (order.append(name), answer(name, *rest))[1])
    monkeypatch.setattr(cuda_driver.cuda, "current_context", lambda: order.append("context"))
    blocks = [cuda_driver.Block(64)]
    cuda_driver.upload(blocks[0].address, np.zeros(16, np.int32))
    order.clear()

    def use_and_drop() -> None:
        cuda_driver.upload(blocks[0].address, np.zeros(16, np.int32))
        blocks.clear()

    thread = threading.Thread(target=use_and_drop)
    thread.start()
    thread.join()
    assert order == ["context", "cuMemcpyHtoDAsync", "context", "cuMemFree"]
    assert not false_driver.held


@simulated
def test_where_no_graph_can_be_captured_it_is_said_once(false_driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(cuda_executable, "tell", said.append)
    launched: list[Any] = []

    def launch(on: Any) -> None:
        launched.append(on)
        if on == 1:
            raise RuntimeError("no")

    monkeypatch.setattr(cuda_executable, "stream", lambda: 0)
    bound = run_of(launch)
    for _ in range(6):
        bound.run()
    assert launched == [0, 1, 0, 1, 0, 1, 0, 0, 0]
    assert said == ["A token takes longer than it could: the GPU's driver captures no graph: no."]
    assert false_driver.calls.count("cuStreamBeginCapture") == false_driver.calls.count("cuStreamEndCapture") == 3


@simulated
def test_memory_that_logits_come_to_is_used_again_when_they_are_gone() -> None:
    host, size = cuda_driver.HostMemory(), np.dtype(np.float32)
    first, second, third = (host.array((2, 3), size) for _ in range(3))
    assert len({array.ctypes.data for array in (first, second, third)}) == 3
    place, view = first.ctypes.data, first[1:]
    first[:] = 7
    del first
    assert host.array((2, 3), size).ctypes.data not in (place, second.ctypes.data)
    assert (view == 7).all()
    del view
    again = host.array((1, 4), size)
    assert (again.ctypes.data, again.shape, again.dtype) == (place, (1, 4), size)
    place = again.ctypes.data
    del again  # the other one, which was lent before it, is still there
    assert host.array((2, 2), size).ctypes.data == place


@pytest.mark.parametrize("capabilities", [["7.5", "8.0"], ["9.0"]], ids=" ".join)
def test_every_kernel_compiles(capabilities: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "compile_cuda.py"), *capabilities],
        capture_output=True, text=True, env=os.environ | {"NUMBA_ENABLE_CUDASIM": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
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
        shape = "m8n8k16" if capability == "7.5" else "m16n8k32"
        assert all(
            facts["products"]["dp4a.s32.s32"] >= 8 for name, facts in kernels.items() if name.startswith("matvec ")
        )
        assert all(facts["products"][shape] for name, facts in kernels.items() if name.startswith("matmul "))
