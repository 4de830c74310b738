"""Small programs over numpy arrays, run on any device: what a kernel test needs."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import naive
import numpy as np
import pytest
from extras import needs

from rwkv_cli.kernels.cpu import backend as cpu
from rwkv_cli.kernels.cpu import steps
from rwkv_cli.kernels.cpu.lower import CpuProgram
from rwkv_cli.kernels.cpu.quantize_packed import pack_rows
from rwkv_cli.kernels.cpu.quantize_weights import quantize_rows
from rwkv_cli.kernels.memory import Buffer
from rwkv_cli.kernels.program import Count, Input, InputMatrix, LayerState, Product, Program, TakeRows, Value
from rwkv_cli.quant.formats import Floats, Int8, Packed, format_of, int8, packed
from rwkv_cli.quant.formats.packed import PackedFormat

RNG = np.random.default_rng(0)
BAND = 256
"""Bytes before and after each array of a program that nobody may write."""
_PATTERN = 0xA5
Cases = list[tuple[Any, ...]]
"""The arguments of each case of a test, behind the device."""
INTERPRETED = bool(os.environ.get("RWKV_TEST_PTX"))
"""True if tests of the GPU run in the interpreter of PTX, which guards all memory by itself."""
REAL_GPU = os.environ.get("NUMBA_ENABLE_CUDASIM") == "0" and not INTERPRETED
"""True if tests of the GPU run on one, and not in numba's simulator."""
ALL_SIZES = REAL_GPU or INTERPRETED
"""True if tests of the GPU have the CPU's sizes, too, for which numba's simulator is too slow."""


def backend(device: str) -> Any:
    """A device by name; "cuda" is numba's simulator where there is no GPU."""
    if device == "cpu":
        return cpu
    needs("numba_cuda", "dev")
    from rwkv_cli.kernels.cuda import backend as cuda

    return cuda


class Lab:
    """Builds a program whose inputs are numpy arrays, and runs it."""

    def __init__(self, device: str = "cpu", threads: int = 2, room: int = 0) -> None:
        """`room` is how many more rows the program could take than it is given."""
        self.backend, self.threads, self.room = backend(device), threads, room
        self.arrays: dict[str, Any] = {}
        self.inputs: list[Input | InputMatrix] = []
        self._counts: dict[int, Count] = {}
        self.ops = Program()

    def rows(self, n: int) -> Count:
        """The count of rows that will be n."""
        return self._counts.setdefault(n, Count(n + self.room))

    def _given(self, node: Any, array: Any) -> Any:
        self.inputs.append(node)
        self.arrays[node.name] = array
        return node

    def matrix(self, x: Any) -> InputMatrix:
        """A float32 matrix as an input."""
        node = InputMatrix(self.rows(len(x)), x.shape[1], name=f"matrix{len(self.inputs)}")
        matrix: InputMatrix = self._given(node, np.ascontiguousarray(x, np.float32))
        return matrix

    def value(self, x: Any) -> Value:
        """A copy of a matrix that operations may change."""
        return self.ops.add(TakeRows(self.matrix(x), self.ids(np.arange(len(x)))))

    def ids(self, values: Any) -> Input:
        """int64, one a row."""
        node = Input(f"ids{len(self.inputs)}", (self.rows(len(values)),), "I64")
        ids: Input = self._given(node, np.array(values, np.int64))
        return ids

    def starts(self, lengths: tuple[int, ...]) -> Input:
        """The starts of sequences of these lengths."""
        node = Input(f"starts{len(self.inputs)}", (len(lengths) + 1,), "I64")
        starts: Input = self._given(node, begins(lengths))
        return starts

    def state(self, states: Any) -> LayerState:
        """States [B, …] of the middle of three layers. The others hold 7, which nobody may change."""
        layers = np.full((3, *states.shape), 7.0, np.float32)
        layers[1] = states
        node = Input(f"state{len(self.inputs)}", layers.shape)
        return LayerState(self._given(node, self.backend.device_array(layers)), 1)

    def keeping(self, state: LayerState, rows: int) -> LayerState:
        """The same part of a state, kept between so many rows. What is not kept stays NaN."""
        layers, _, *shape = state.array.shape
        kept = np.full((rows, layers, *shape), np.nan, np.float32)
        node = Input(f"kept{len(self.inputs)}", (self.rows(rows), layers, *shape))
        return replace(state, kept=self._given(node, kept))

    def kept(self, state: LayerState) -> Any:
        """What a run has kept of a state, by row."""
        assert state.kept is not None
        layers = self.arrays[state.kept.name]
        assert np.isnan(layers[:, [0, 2]]).all()
        return layers[:, 1]

    def state_after(self, state: LayerState) -> Any:
        """The state as a run has left it."""
        layers = np.asarray(self.arrays[state.array.name])
        assert (layers[[0, 2]] == 7).all()
        return layers[1]

    def vector(self, values: Any) -> Any:
        return self.backend.vector(np.ascontiguousarray(values, np.float32))

    def weight(self, stored: Any) -> Any:
        """A stored matrix, or a float32 array as one."""
        return self.backend.weight(Floats("float", "F32", stored) if isinstance(stored, np.ndarray) else stored)

    def compile(self, *outputs: Value) -> Any:
        """The program so far."""
        program = Program(*self.inputs)
        program.operations = self.ops.operations
        for value in outputs:
            program.keep(value)
        return self.backend.compile(program, self.threads)

    def run(self, *outputs: Value) -> Any:
        """Run the program: an array for each output, or the only one."""
        got = self.run_all(*outputs)
        return got[0] if len(got) == 1 else got

    def run_all(self, *outputs: Value) -> list[Any]:
        """Run the program, and return an array for each output.

        On a real GPU the run is the third one, which replays a graph. It must give the bits of the first, which
        launches kernels one by one.
        """
        executable = self.compile(*outputs)
        earlier = [self._run_a_copy(executable, outputs) for _ in range(2 * self.on_gpu)]
        with guarded(executable):
            executable.run(self.arrays)
        got = [executable.read(value) for value in outputs]
        if self.on_gpu:
            assert executable.is_graph
            for before, now in zip(earlier[0], got, strict=True):
                np.testing.assert_array_equal(before, now)
        return got

    @property
    def on_gpu(self) -> bool:
        """True if programs run on a real GPU."""
        return REAL_GPU and self.backend is not cpu

    def _run_a_copy(self, executable: Any, outputs: tuple[Value, ...]) -> list[Any]:
        """Run a program on copies of the arrays that it changes."""
        executable.run({n: a if isinstance(a, np.ndarray) else a.copy() for n, a in self.arrays.items()})
        return [executable.read(value) for value in outputs]


def read_as(x: Any, stored: Any, mixed: bool = False) -> Any:
    """x as a product with a stored matrix reads it: some factors are rounded to 8 bits (`contract.activation_bits`)."""
    coarse = stored.layout.startswith("columns") or (stored.layout == "tile4" and mixed)
    return naive.rounded(x, 8 if coarse else 15)


def in_float16(x: Any, stored: Any) -> Any:
    """x times a stored matrix as a GPU computes it with many tokens: both have 11 bits, but for a row's own factor."""
    w = stored.float32().astype(float)
    if stored.format == "int8":
        return naive.eleven_bits(x) @ naive.eleven_bits(w).T
    rows = stored.rows.reshape(-1, 1)[: len(w)].astype(float)
    return naive.eleven_bits(x) @ naive.eleven_bits(np.rint(w / rows)).T * rows.T


def linear(x: Any, stored: Any, activation: Any = "", bias: Any = None, **options: Any) -> Any:
    """One matrix product on a device."""
    lab = Lab(**options)
    weight = lab.weight(stored)
    product = Product(lab.matrix(x), weight, activation, None if bias is None else lab.vector(bias))
    return lab.run(*lab.ops.linear(product))


@contextmanager
def guarded(executable: Any) -> Iterator[None]:
    """Fill a program's memory with NaN, or the largest integers, so that what is not written is seen.

    Where `lone_arrays` has laid the arrays out, the bands between them must stay what they are.
    """
    on_cpu = isinstance(executable, CpuProgram)
    offsets: dict[Buffer, int] = executable._runnable._offsets if on_cpu else executable._offsets
    memory = executable._runnable._workspace if on_cpu else np.empty(executable._workspace.size, np.uint8)
    memory[:] = _PATTERN if LONE else 0xFF
    if LONE:
        for buffer, offset in offsets.items():
            memory[offset : offset + buffer.size] = 0xFF
    if not on_cpu:
        write_block(executable._workspace, memory)
    yield
    if not on_cpu:
        memory = read_block(executable._workspace)
    if LONE:
        used = np.zeros(len(memory), bool)
        for buffer, offset in offsets.items():
            used[offset : offset + buffer.size] = True
        assert (memory[~used] == _PATTERN).all(), "a kernel wrote beyond its array"


def write_block(block: Any, values: Any) -> None:
    """Fill memory of the GPU with bytes."""
    from rwkv_cli.kernels.cuda import driver

    driver.upload(block.address, values)
    if INTERPRETED:
        from ptx import gpu

        gpu.forget(block)


def read_block(block: Any) -> Any:
    """The bytes in memory of the GPU."""
    from rwkv_cli.kernels.cuda import driver

    values = np.empty(block.size, np.uint8)
    driver.download(values, block.address)
    return values


@contextmanager
def guarded_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have bands around all memory of the GPU, which nothing may touch. The memory begins as NaN."""
    if INTERPRETED:
        yield
        return
    from rwkv_cli.kernels.cuda import driver

    allocate = driver.Block.__init__
    blocks: list[Any] = []

    def make(block: Any, size: int) -> None:
        whole: Any = object.__new__(driver.Block)
        allocate(whole, size + 2 * BAND)
        filled = np.full(whole.size, _PATTERN, np.uint8)
        filled[BAND : BAND + size] = 0xFF
        write_block(whole, filled)
        block.size, block.address = size, whole.address + BAND
        blocks.append(whole)

    monkeypatch.setattr(driver.Block, "__init__", make)
    if not REAL_GPU:
        from simulator import use_greenlets

        use_greenlets(monkeypatch)
    yield
    for whole in blocks:
        held = read_block(whole)
        assert (held[:BAND] == _PATTERN).all()
        assert (held[-BAND:] == _PATTERN).all()


LONE: list[bool] = []
"""Not empty while every array of a program has memory of its own."""


def lone_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every array of a program lie alone, with a band on each side."""

    def plan(buffers: Any, align: int = BAND) -> Any:
        assert BAND % align == 0
        offsets, end = {}, BAND
        for buffer in buffers:
            if buffer.first is not None:
                offsets[buffer] = end
                end += -(-buffer.size // BAND) * BAND + BAND
        return offsets, end

    monkeypatch.setattr(steps, "plan", plan)
    if importlib.util.find_spec("numba_cuda") is not None:
        monkeypatch.setattr("rwkv_cli.kernels.cuda.executable.plan", plan)
    monkeypatch.setattr("lab.LONE", [True])


def quantize(w: Any, layout: str = "tile") -> Int8 | Packed:
    """A matrix in a layout of any quantized format."""
    format = format_of(layout)
    if isinstance(format, PackedFormat):
        return packed.quantize(w, layout, partial(pack_rows, bits=format.bits))
    return int8.quantize(w, layout, quantize_rows)


def normal(*shape: int, scale: float = 1.0) -> Any:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def outliers(T: int, K: int) -> Any:
    """Activations with one channel thousands of times the others, as layer 0's att.output sees."""
    x = normal(T, K)
    x[:, K // 3] *= 3000
    return x


def begins(lengths: tuple[int, ...]) -> Any:
    """The first row of each sequence, and the end of the last one."""
    return np.cumsum([0, *lengths])


def parts(lengths: tuple[int, ...]) -> dict[int, slice]:
    """The rows of each sequence that has some."""
    return {b: slice(*ends) for b, ends in enumerate(pairwise(begins(lengths).tolist())) if ends[1] > ends[0]}


def cases(names: str, cpu: Cases, cuda: Cases | None) -> Any:
    """Parametrize a test by device and `names`. numba's simulator of a GPU is slow, and gets few and small cases.

    A real GPU gets all of both, and so does the interpreter of PTX. With `cuda` = None the test is of the CPU alone.
    """
    given = [("cpu", *case) for case in cpu]
    if cuda is not None:
        given += [("cuda", *case) for case in (*cpu * ALL_SIZES, *cuda)]
    return pytest.mark.parametrize(("device", *filter(None, names.split(", "))), given)


each_device = cases("", [()], [()])


def with_each(cases: Cases, *options: Any) -> Cases:
    """Every case with each of some options behind it."""
    return [(*case, option) for case in cases for option in options]


def check(got: Any, want: Any, limit: float = 2e-6) -> None:
    assert got.shape == want.shape
    """Hold outputs to the oracle's: by their norms, and the worst of them."""
    assert naive.error_ratio(got, want) < limit
    assert np.abs(got - want).max() < 20 * limit * max(1.0, np.abs(want).max())
