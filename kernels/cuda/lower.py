"""The CUDA twin's Recorder: a list of launches on buffers of its own, from the second run on as one CUDA graph."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import DeviceError
from rwkv_cli.kernels.contract import Array, Lerp, Norm, Product, Starts
from rwkv_cli.kernels.cuda.array import DeviceArray
from rwkv_cli.kernels.cuda.device import elementwise as cuda_elementwise
from rwkv_cli.kernels.cuda.device import levels as cuda_levels
from rwkv_cli.kernels.cuda.device import matmul as cuda_matmul
from rwkv_cli.kernels.cuda.device import scores as cuda_scores
from rwkv_cli.kernels.cuda.device import wkv as cuda_wkv
from rwkv_cli.kernels.cuda.device.compile import SIMULATED, Kernel
from rwkv_cli.kernels.cuda.device.elementwise import ACTIVATIONS, FLOATS
from rwkv_cli.kernels.cuda.driver import Block, Graph, download, pinned, stream, upload
from rwkv_cli.kernels.cuda.memory import Memory, round_up
from rwkv_cli.kernels.cuda.weights import FloatMatrix, Fragments, Rows, Weight


class _Launch(NamedTuple):
    kernel: Kernel
    grid: tuple[int, ...]
    threads: int | tuple[int, int]
    arguments: tuple[Any, ...]

    def __call__(self, on: Any) -> None:
        self.kernel.dispatcher[self.grid, self.threads, on](*self.arguments)


class _Levels(NamedTuple):
    """Space for an activation's levels, which its kernel puts there if it is told to by `ask`."""

    levels: DeviceArray
    factors: DeviceArray
    ask: Callable[[], None]


class _Norm(NamedTuple):
    """The last launch, if that is a layer norm which a token shift may yet join."""

    x: Array
    norm: Norm
    out: Array


class Recorder:
    """See `backend.Recorder`: a program on the GPU.

    `inputs` that are the host's are copied to fixed places before a run. Of those that are the device's only the
    addresses are, so kernels that read or change a state find it through them, and a graph serves any state.
    """

    def __init__(self, inputs: Sequence[Array]) -> None:
        self._launches: list[_Launch] = []
        self._memory = Memory()
        self._tables: list[tuple[Block, list[list[int]]]] = []
        """Of products, to be uploaded when all is recorded."""
        self._norm: _Norm | None = None
        self._graph: Graph | None = None
        self._runs = 0
        self._output: NDArray[np.uint8] | None = None
        # addresses of all inputs, then those of them that are the host's
        at, self._places = round_up(8 * len(inputs), 16), list[int]()
        for array in inputs:
            self._places.append(at)
            if not isinstance(array, DeviceArray):
                at += round_up(array.nbytes, 16)
        self._staged = np.zeros(at, np.uint8)
        self._table = self._memory.keep(at)
        self._inputs = [
            array if isinstance(array, DeviceArray) else DeviceArray(self._table, array.shape, array.dtype, place)
            for array, place in zip(inputs, self._places, strict=True)
        ]
        self._originals = list(inputs)

    def _device(self, array: Array) -> DeviceArray:
        """The array as the kernels see it: a host's input is where it was copied to."""
        for original, place in zip(self._originals, self._inputs, strict=True):
            if array is original:
                return place
        assert isinstance(array, DeviceArray)
        return array

    def _slot(self, array: Array) -> tuple[int, int]:
        """Where the address of the input that `array` lies in is found, and how many bytes on it begins."""
        for i, original in enumerate(self._originals):
            if isinstance(original, DeviceArray) and original.block is array.block:
                return self._table.address + 8 * i, array.offset - original.offset
        raise ValueError("the state is none of the program's inputs")

    def _space(self, T: int, K: int) -> tuple[DeviceArray, DeviceArray]:
        """Levels and factors of [T, K], in whole blocks of the kernel that reads them."""
        blocks = round_up(-(-T // 8), _shape(T)[1]) * -(-K // 32)
        return self._memory.empty((blocks, cuda_levels.LEVEL_BYTES), np.int8), self._memory.empty((blocks, 8))

    def _launch(self, kernel: Kernel, grid: tuple[int, ...], threads: int | tuple[int, int], *arguments: Any) -> None:
        numbers = tuple(np.float32(a) if isinstance(a, float) else int(a) for a in arguments)
        self._launches.append(_Launch(kernel, grid, threads, numbers))
        self._norm = None

    def _each(self, kernel: Kernel, columns: int, rows: int, *arguments: Any) -> None:
        """A thread for each of `columns` numbers, `rows` times."""
        threads = min(cuda_elementwise.THREADS, round_up(columns, 32))
        self._launch(kernel, (-(-columns // threads), rows), threads, *arguments)

    # Recorder

    def embed(self, ids: Array, table: Weight) -> Array:
        out = self._memory.empty((len(ids), table.shape[1]))
        T, D, at = *out.shape, self._device(ids).address
        if isinstance(table, FloatMatrix):
            self._each(cuda_elementwise.embed_float, D, T, at, table.bits.address, table.kind, out.address, D)
        else:
            assert isinstance(table, Rows)
            values, scales = table.values.address, table.scales.address
            self._each(cuda_elementwise.embed_int8, D, T, at, values, scales, table.unit, out.address, D, table.width)
        return out

    def layer_norm(self, x: Array, norm: Norm) -> Array:
        out = self._memory.empty(x.shape)
        T, D = x.shape
        threads = min(cuda_elementwise.NORM_THREADS, round_up(D, 32))
        self._launch(
            cuda_elementwise.layer_norm, (T,), threads,
            x.address, norm.weight.address, norm.bias.address, out.address, norm.eps, D,
        )  # fmt: skip
        self._norm = _Norm(x, norm, out)
        return out

    def round_to(self, x: Array, dtype: str) -> None:
        if dtype != "F32":
            n, x.levels = x.shape[0] * x.shape[1], None
            self._each(cuda_elementwise.round_to, n, 1, x.address, FLOATS.index(dtype), n)

    def take(self, x: Array, rows: NDArray[np.int64]) -> Array:
        first = int(rows[0])
        if np.array_equal(rows, np.arange(first, first + len(rows))):
            return x[first : first + len(rows)]
        out = self._memory.empty((len(rows), x.shape[1]))
        (T, D), at = out.shape, self._memory.int64(rows)
        self._each(cuda_elementwise.take, D, T, x.address, at, out.address, D)
        return out

    def token_shift(self, x: Array, starts: Starts, last: Array) -> Array:
        (T, D), delta, (slot, offset) = x.shape, self._memory.empty(x.shape), self._slot(last)
        prior, closing = np.arange(-1, T - 1), np.zeros(T, np.int64)
        prior[starts[:-1]] = -1 - np.arange(len(starts) - 1)
        closing[starts[:-1]] = starts[1:] - 1
        rows = self._memory.int64(prior), self._memory.int64(closing), slot, offset
        joined = self._norm
        if joined is not None and joined.out is x:
            before = self._launches.pop()
            norm = joined.norm
            self._launch(
                cuda_elementwise.norm_shift, (T,), before.threads, joined.x.address, norm.weight.address,
                norm.bias.address, x.address, delta.address, *rows, norm.eps, D,
            )  # fmt: skip
        else:
            threads = min(cuda_elementwise.THREADS, round_up(D, 32))
            self._launch(cuda_elementwise.shift, (T,), threads, x.address, delta.address, *rows, D)
        return delta

    def linear(self, *products: Product) -> list[Array]:
        outs = [self._memory.empty((_tokens(product.x), product.weight.shape[0])) for product in products]
        self._multiply(products, outs, add=False)
        return list(outs)

    def add_linear(self, x: Array, y: Array, weight: Weight) -> None:
        self._multiply([Product(y, weight)], [x], add=True)

    def _multiply(self, products: Sequence[Product], outs: Sequence[DeviceArray], add: bool) -> None:
        """Put or add each product into its [T, N]."""
        int8 = [pair for pair in zip(products, outs, strict=True) if isinstance(pair[0].weight, Fragments)]
        if int8:
            self._multiply_int8(int8, add)
        for product, out in zip(products, outs, strict=True):
            if isinstance(product.weight, FloatMatrix):
                x, (T, N), side = self._plain(product.x), out.shape, cuda_matmul.SIDE
                weight, bias = product.weight, product.bias.address if product.bias is not None else 0
                self._launch(
                    cuda_matmul.matmul_float, (-(-N // side), -(-T // side)), (side, side),
                    x.address, x.strides[0] // 4, weight.bits.address, weight.kind, bias,
                    ACTIVATIONS.index(product.activation), add, out.address, out.strides[0] // 4, T, N,
                    weight.shape[1],
                )  # fmt: skip

    def _plain(self, x: Array | Lerp) -> DeviceArray:
        """x, computed if it is a Lerp."""
        if not isinstance(x, Lerp):
            return x  # type: ignore[no-any-return]
        out = self._memory.empty(x.x.shape)
        T, K = out.shape
        self._each(cuda_elementwise.lerp, K, T, *_mixed(x), out.address, K)
        return out

    def _multiply_int8(self, pairs: Sequence[tuple[Product, DeviceArray]], add: bool) -> None:
        T, shape = len(pairs[0][1]), _shape(len(pairs[0][1]))
        inputs, at, table = list[list[int]](), dict[int, tuple[DeviceArray, DeviceArray]](), list[list[int]]()
        for product, out in pairs:
            weight, x = product.weight, product.x
            if id(x) not in at:
                if not isinstance(x, Lerp) and x.levels is not None:
                    x.levels.ask()
                    at[id(x)] = x.levels[:2]
                else:
                    at[id(x)] = self._space(T, weight.shape[1])
                    inputs.append([*_mixed(x), weight.shape[1], *(a.address for a in at[id(x)])])
            levels, factors = at[id(x)]
            row = [
                weight.values.address, weight.scales.address, weight.strips, weight.groups, levels.address,
                factors.address, int(np.float32(weight.unit).view(np.int32)),
                product.bias.address if product.bias is not None else 0, ACTIVATIONS.index(product.activation), add,
                out.address, out.strides[0] // 4, weight.shape[0], 0, 0,
            ]  # fmt: skip
            table.append(row)
            out.levels = self._asked_of_product(row) if T == 1 and not add else None
        quads = max(8 * product.weight.groups for product, _ in pairs)
        if inputs:
            threads = min(cuda_levels.THREADS, quads)
            self._launch(
                cuda_levels.quantize, (-(-quads // threads), T, len(inputs)), threads, self._memory.int64(inputs)
            )
        strips, facts = (
            max(product.weight.strips for product, _ in pairs),
            self._memory.keep(8 * len(table) * len(table[0])),
        )
        self._tables.append((facts, table))
        # a warp for each group of columns, as far as that goes
        warps = min(quads // 8, cuda_matmul.warps(strips * len(pairs)) if T == 1 else shape[2])
        if T == 1:
            self._launch(cuda_matmul.matvec, (-(-strips // 2), len(pairs)), 64 * warps, facts.address)
        else:
            grid = -(-strips // shape[0]), -(-T // (8 * shape[1])), len(pairs)
            self._launch(cuda_matmul.matmul(*shape), grid, 32 * warps, facts.address, T)

    def _asked_of_product(self, row: list[int]) -> _Levels:
        """Space for the levels of one token's product whose facts are `row`."""
        levels, factors = self._space(1, row[12])

        def ask() -> None:
            row[13:] = levels.address, factors.address

        return _Levels(levels, factors, ask)

    def _asked_of_heads(self, y: DeviceArray, N: int) -> _Levels | None:
        """Space for the levels of y, which the next launch makes by heads of N, and which come before its last
        argument."""
        if N % 32:
            return None
        (levels, factors), index = self._space(*y.shape), len(self._launches)

        def ask() -> None:
            launch = self._launches[index]
            arguments = *launch.arguments[:-3], levels.address, factors.address, launch.arguments[-1]
            self._launches[index] = launch._replace(arguments=arguments)

        return _Levels(levels, factors, ask)

    def add_gated(self, x: Array, y: Array, gate: Array) -> None:
        n, x.levels = x.shape[0] * x.shape[1], None
        self._each(cuda_elementwise.add_gated, n, 1, x.address, y.address, gate.address, n)

    def split(self, x: Array, parts: int) -> list[Array]:
        width = x.shape[1] // parts
        return [x[:, i * width : (i + 1) * width] for i in range(parts)]

    def wkv4(self, r: Array, k: Array, v: Array, w: Array, u: Array, starts: Starts, state: Array) -> Array:
        y, D, threads = self._memory.empty(r.shape), r.shape[1], cuda_wkv.CHANNELS
        self._launch(
            cuda_wkv.wkv4, (-(-D // threads), len(starts) - 1), threads,
            *(a.address for a in (r, k, v, w, u)), self._memory.int64(starts), *self._slot(state), y.address, D,
        )  # fmt: skip
        return y

    def wkv6(
        self, r: Array, k: Array, v: Array, w: Array, u: Array, norm: Norm, gate: Array | None, starts: Starts,
        state: Array,
    ) -> Array:  # fmt: skip
        y, D, (H, N) = self._memory.empty(r.shape), r.shape[1], u.shape
        y.levels = self._asked_of_heads(y, N)
        self._launch(
            cuda_wkv.wkv6(N), (H, len(starts) - 1), cuda_wkv.threads(N),
            r.address, k.address, v.address, w.address, D if len(w) > 1 else 0, u.address, norm.weight.address,
            norm.bias.address, gate.address if gate is not None else 0, norm.eps, self._memory.int64(starts),
            *self._slot(state), y.address, 0, 0, D,
        )  # fmt: skip
        return y

    def wkv7(
        self, r: Array, w: Array, k: Array, v: Array, a: Array, g: Array, residual: tuple[Array, Array] | None,
        k_k: Array, k_a: Array, r_k: Array, norm: Norm, starts: Starts, state: Array,
    ) -> Array:  # fmt: skip
        y, D, (H, N) = self._memory.empty(r.shape), r.shape[1], r_k.shape
        y.levels = self._asked_of_heads(y, N)
        first, gate = (part.address for part in residual) if residual is not None else (0, 0)
        self._launch(
            cuda_wkv.wkv7(N), (H, len(starts) - 1), cuda_wkv.threads(N),
            *(part.address for part in (r, w, k, v, a, g)), first, gate, k_k.address, k_a.address, r_k.address,
            norm.weight.address, norm.bias.address, norm.eps, self._memory.int64(starts), *self._slot(state),
            y.address, 0, 0, D,
        )  # fmt: skip
        return y

    def cross_entropy(self, logits: Array, targets: Array) -> Array:
        logits = self._device(logits)
        (T, V), nll = logits.shape, self._memory.empty((len(logits),), np.float64)
        threads = min(cuda_scores.THREADS, round_up(V, 32))
        at = self._device(targets).address
        self._launch(cuda_scores.cross_entropy, (T,), threads, logits.address, at, nll.address, V)
        return nll

    def divergence(self, p: Array, q: Array) -> tuple[Array, Array]:
        p, q = self._device(p), self._device(q)
        (T, V), kl, same = p.shape, self._memory.empty((len(p),), np.float64), self._memory.empty((len(p),), np.bool_)
        threads = min(cuda_scores.THREADS, round_up(V, 32))
        self._launch(cuda_scores.divergence, (T,), threads, p.address, q.address, kl.address, same.address, V)
        return kl, same

    # running

    def run(self, inputs: Sequence[Array]) -> None:
        for block, table in self._tables:
            upload(block.address, np.array(table, np.int64))
        self._originals, self._inputs, self._tables = [], [], []  # of use while it is recorded
        addresses = self._staged[: 8 * len(inputs)].view(np.int64)
        for i, (array, place) in enumerate(zip(inputs, self._places, strict=True)):
            if isinstance(array, DeviceArray):
                addresses[i] = array.address
            else:
                addresses[i] = self._table.address + place
                self._staged[place : place + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        upload(self._table.address, self._staged)
        self._runs += 1
        # the first run compiles and loads the kernels, which a capture must not
        if self._runs == 2 and not SIMULATED:
            try:
                self._graph = Graph(self._launch_all)
            except DeviceError:
                self._graph = None
        if self._graph is not None:
            self._graph()
        else:
            self._launch_all(stream())

    def _launch_all(self, on: Any) -> None:
        for launch in self._launches:
            launch(on)

    def read(self, array: Array) -> NDArray[Any]:
        if self._output is None or self._output.size < array.nbytes:
            self._output = pinned(array.nbytes)
        part = self._output[: array.nbytes]
        download(part, array.address)
        values: NDArray[Any] = part.view(array.dtype).reshape(array.shape)
        return values.copy()


def _shape(T: int) -> tuple[int, int, int, int]:
    """Which of `cuda_matmul.SHAPES` multiplies T tokens."""
    return next((shape for shape in cuda_matmul.SHAPES if 8 * shape[1] >= T), cuda_matmul.SHAPES[-1])


def _tokens(x: Array | Lerp) -> int:
    return len(x.x if isinstance(x, Lerp) else x)


def _mixed(x: Array | Lerp) -> list[int]:
    """x, delta and mix with their strides, as `cuda_matmul` and `lerp` want them."""
    if not isinstance(x, Lerp):
        return [x.address, x.strides[0] // 4, 0, 0, 0, 0]
    stride = x.mix.strides[0] // 4 if len(x.mix) > 1 else 0
    return [x.x.address, x.x.strides[0] // 4, x.delta.address, x.delta.strides[0] // 4, x.mix.address, stride]
