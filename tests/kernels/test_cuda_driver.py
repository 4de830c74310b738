"""The calls of the GPU's driver, on a false one whose memory is the host's: graphs, threads, memory."""

import gc
import importlib.util
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from false_driver import Driver, use_false_driver
from lab import guarded_gpu, normal

from rwkv_cli.errors import DeviceError
from rwkv_cli.kernels import program as p
from rwkv_cli.quant.formats import Floats

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (rwkv-cli[cuda])", allow_module_level=True)

from rwkv_cli.kernels.cuda import backend as cuda
from rwkv_cli.kernels.cuda import driver as cuda_driver
from rwkv_cli.kernels.cuda import executable as cuda_executable
from rwkv_cli.kernels.cuda.device.compile import SIMULATED

pytestmark = [
    # Floats of the simulator are numpy's, which warns where a GPU goes on.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(not SIMULATED, reason="NUMBA_ENABLE_CUDASIM=0: a real GPU has a driver of its own"),
]


@pytest.fixture(autouse=True)
def _guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with guarded_gpu(monkeypatch):
        yield


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
