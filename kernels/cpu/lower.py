"""The CPU's Backend: weights as they are mapped, and programs of kernels. Contracts are in `backend`."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import Activation, Lerp, Norm, Product, Starts
from rwkv_cli.kernels.cpu import elementwise, matmul, scores, wkv
from rwkv_cli.kernels.cpu.limits import int8_peak as int8_peak
from rwkv_cli.kernels.cpu.limits import read_bandwidth as read_bandwidth
from rwkv_cli.kernels.cpu.team import Program

Array = NDArray[Any]

_PART_BYTES = 1 << 18
"""Of weights that a thread takes at a time for one token: some microseconds."""
_PARTS = 8
"""For each thread, where there is enough work: the last to finish is then not far behind."""
_SMALL = 1 << 14
"""Numbers below which one part is done before another would begin."""


class Int8Weight(NamedTuple):
    layout: str
    shape: tuple[int, int]
    values: NDArray[np.int8]
    scales: NDArray[np.uint16]
    unit: np.float32
    """2^112 of the tensor's unit: float16 bits stand for 2^−112 of their value as float32 bits."""


class FloatWeight(NamedTuple):
    dtype: str
    bits: NDArray[Any]


Weight = Int8Weight | FloatWeight


class _Rounded(NamedTuple):
    """Activations as integers (see `matmul`)."""

    levels: Array
    factors: Array
    offsets: Array


def int8_weight(
    layout: str, shape: tuple[int, int], values: NDArray[np.int8], scales: NDArray[np.uint16], unit: int
) -> Weight:
    return Int8Weight(
        layout, shape, np.ascontiguousarray(values), np.ascontiguousarray(scales), np.float32(2.0 ** (112 + unit))
    )


def float_weight(dtype: str, bits: NDArray[Any]) -> Weight:
    return FloatWeight(dtype, np.ascontiguousarray(bits))


def weight_size(weight: Weight) -> tuple[int, int, bool]:
    if isinstance(weight, FloatWeight):
        return weight.bits.nbytes, weight.bits.size, False
    return weight.values.nbytes + weight.scales.nbytes, weight.values.size, weight.layout == "columns"


def vector(values: NDArray[np.float32]) -> Array:
    return np.ascontiguousarray(values)


def describe() -> str:
    return "the CPU"


def device_array(values: Array) -> Array:
    return values


def record(inputs: Sequence[Array], threads: int) -> "Recorder":
    return Recorder(inputs, threads)


def _references(blocks: Sequence[Any]) -> Iterator[tuple[Any, int]]:
    """Each block and how often it is held: by the list, by what this loop needs, and by every view of it."""
    for block in blocks:
        yield block, sys.getrefcount(block)


# what the loop needs differs from one Python to the next
_NO_VIEWS = next(_references([np.empty(1, np.uint8)]))[1]


def _unused(blocks: Sequence[Any]) -> Any:
    """The first block that has no views, or None."""
    return next((block for block, count in _references(blocks) if count == _NO_VIEWS), None)


class Workspace:
    """Memory of a program's arrays. One that nobody holds any more serves the next of its size: steps run in the order
    in which they were recorded, so whoever reads the first array has run before the second is written."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[NDArray[np.uint8]]] = {}
        self._ids: set[int] = set()

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        blocks = self._blocks.setdefault(size, [])
        block = _unused(blocks)
        if block is None:
            block = np.empty(size + 64, np.uint8)
            blocks.append(block)
            self._ids.add(id(block))
        start = -block.ctypes.data % 64
        array: Array = block[start : start + size].view(dtype).reshape(shape)
        return array

    def owns(self, array: Array) -> bool:
        return id(array.base) in self._ids


class Recorder:
    def __init__(self, inputs: Sequence[Array], threads: int) -> None:
        self._program = Program(inputs)
        self._threads = threads
        self._workspace = Workspace()
        self.empty = self._workspace.empty

    def run(self, inputs: Sequence[Array]) -> None:
        self._program.run(self._threads, inputs)

    def read(self, array: Array) -> Array:
        return array.copy()

    def _add(self, kernel: Any, parts: int, *arguments: Any, then: bool = True) -> None:
        self._program.add(kernel, parts, *arguments, then=then, owned=self._workspace.owns)

    def _parts(self, x: Array) -> int:
        """To share the rows of x between threads."""
        return 1 if x.size < _SMALL else min(len(x), _PARTS * self._threads)

    def _by_rows(self, kernel: Any, x: Array, *arguments: Any) -> None:
        parts = self._parts(x)
        self._add(kernel, parts, *arguments, parts)

    def embed(self, ids: Array, table: Weight) -> Array:
        if isinstance(table, Int8Weight):
            out = self.empty((len(ids), table.shape[1]))
            self._by_rows(elementwise.embed_int8, out, ids, table.values, table.scales, table.unit, out)
        else:
            out = self.empty((len(ids), table.bits.shape[1]))
            self._by_rows(elementwise.embed_floats, out, ids, *_by_size(table), out)
        return out

    def layer_norm(self, x: Array, norm: Norm) -> Array:
        out = self.empty(x.shape)
        self._by_rows(elementwise.layer_norm, x, x, norm.weight, norm.bias, norm.eps, out)
        return out

    def round_to(self, x: Array, dtype: str) -> None:
        if dtype != "F32":
            self._by_rows(elementwise.round_to, x, x, elementwise.DTYPES.index(dtype))

    def take(self, x: Array, rows: NDArray[np.int64]) -> Array:
        out = self.empty((len(rows), x.shape[1]))
        self._add(elementwise.take, 1, x, rows, out)
        return out

    def token_shift(self, x: Array, starts: Starts, last: Array) -> Array:
        delta = self.empty(x.shape)
        parts = 1 if x.size < _SMALL else min(x.shape[1] // 64 + 1, _PARTS * self._threads)
        self._add(elementwise.shift, parts, x, starts, last, delta, parts)
        return delta

    def linear(self, *products: Product) -> list[Array]:
        rounded = self._rounded([(p.x, p.weight) for p in products])
        out = [
            self._product(x, p.weight, p.activation, p.bias, None)
            for x, p in zip(rounded, products, strict=True)
        ]  # fmt: skip
        self._program.barrier()
        return out

    def add_linear(self, x: Array, y: Array, weight: Weight) -> None:
        self._product(self._rounded([(y, weight)])[0], weight, "", None, x)
        self._program.barrier()

    def _rounded(self, reads: Sequence[tuple[Array | Lerp, Weight]]) -> list[Array | _Rounded]:
        """What each product reads: integers for an int8 matrix, each made once."""
        made: dict[tuple[int, ...], Array | _Rounded] = {}
        keys = []
        for x, weight in reads:
            parts = tuple(map(id, x)) if isinstance(x, Lerp) else (id(x),)
            keys.append((*parts, isinstance(weight, Int8Weight)))
            if keys[-1] not in made:
                made[keys[-1]] = self._round(x) if isinstance(weight, Int8Weight) else self._plain(x)
        self._program.barrier()
        return [made[key] for key in keys]

    def _plain(self, x: Array | Lerp) -> Array:
        if isinstance(x, Lerp):
            out = self.empty(x.x.shape)
            parts = self._parts(out)
            self._add(elementwise.lerp, parts, *x, out, parts, then=False)
            return out
        if not x.flags.c_contiguous:
            zero, out = np.zeros((1, x.shape[1]), np.float32), self.empty(x.shape)
            for t in range(len(x)):
                self._add(elementwise.lerp, 1, x[t : t + 1], zero, zero, out[t : t + 1], 1, then=False)
            return out
        return x

    def _round(self, x: Array | Lerp) -> _Rounded:
        delta, mix = (x.delta, x.mix) if isinstance(x, Lerp) else (None, None)
        x = x.x if isinstance(x, Lerp) else x
        T, K = x.shape
        G = -(-K // matmul.GROUP)
        rounded = _Rounded(
            self.empty((T, G, matmul.PLANES, matmul.GROUP), matmul.LEVEL),
            self.empty((T, G)), self.empty((T, G), np.int32),
        )  # fmt: skip
        parts = 1 if x.size < _SMALL else min(T * G, _PARTS * self._threads)
        stride = 0 if mix is None or len(mix) == 1 else mix.strides[0]
        self._add(matmul.quantize, parts, x, x.strides[0], T, K, delta, mix, stride, *rounded, parts, then=False)
        return rounded

    def _product(
        self, x: Array | _Rounded, weight: Weight, activation: Activation, bias: Array | None, onto: Array | None
    ) -> Array:  # fmt: skip
        """activation(x · wᵀ + bias), or `onto` += x · wᵀ."""
        code = elementwise.ACTIVATIONS.index(activation)
        if isinstance(weight, FloatWeight):
            assert not isinstance(x, _Rounded)
            N = len(weight.bits)
            y = self.empty((len(x), N))
            parts = min(-(-N // 4), _PARTS * self._threads)
            self._add(matmul.floats, parts, *_by_size(weight), x, y, parts)
            return self._finish(y, N, code, bias, onto)
        assert isinstance(x, _Rounded)
        T, N = len(x.factors), weight.shape[0]
        padded = weight.values.shape[0] * weight.values.shape[2]
        tile = weight.layout == "tile"
        # into place if every output is one of the matrix's own, and the kernel has a use for bias and activation
        direct = padded == N and (tile or (bias is None and not code))
        y = onto if direct and onto is not None else self.empty((T, padded))
        adds = direct and onto is not None
        if tile:
            S, G = weight.scales.shape[:2]
            strips = self._strips(T, S, G)
            self._add(
                matmul.tiles, -(-S // strips), weight.values, weight.scales, S, G, *x, T, weight.unit, y,
                bias if direct else None, adds, code if direct else 0, strips, then=False,
            )  # fmt: skip
        elif T == 1:
            self._sparse(x, weight, y, adds)
        else:
            parts = padded // min(32, weight.values.shape[2])
            self._add(matmul.columns, parts, weight.values, weight.scales, *x, T, weight.unit, y, adds, then=False)
        return y if direct else self._finish(y, N, code, bias, onto)

    def _strips(self, T: int, S: int, G: int) -> int:
        """Of a part: for one token by the bytes that are read, for many as few as give every thread enough parts."""
        bytes_ = G * 544
        most = _PART_BYTES // bytes_ if T == 1 else min(8 * _PART_BYTES // bytes_, S // (_PARTS * self._threads))
        return max(1, most // matmul.STRIPS) * matmul.STRIPS

    def _sparse(self, x: _Rounded, weight: Int8Weight, y: Array, onto: bool) -> None:
        B, K, W = weight.values.shape
        G = K // matmul.GROUP
        rows, levels = self.empty((G, matmul.GROUP), np.int64), self.empty((G, matmul.GROUP), np.int16)
        count = self.empty((G,), np.int64)
        wide = x.levels.dtype == np.int8
        parts = min(G, 2 * self._threads)
        self._add(
            matmul.pick, parts, x.levels if wide else None, None if wide else x.levels, rows, levels, count, parts
        )  # fmt: skip
        # blocks are cut until every thread has as many pieces
        width = W
        while B * (W // width) % self._threads and width > 64:
            width //= 2
        self._add(
            matmul.columns_one, B * (W // width), weight.values, weight.scales, rows, levels, count, x.factors,
            weight.unit, y, onto, width,
        )  # fmt: skip

    def _finish(self, y: Array, N: int, code: int, bias: Array | None, onto: Array | None) -> Array:
        """The first N columns of y, with what its kernel has left to do."""
        self._program.barrier()
        if onto is None and bias is None and not code and y.shape[1] == N:
            return y
        out = self.empty((len(y), N)) if onto is None else onto
        parts = self._parts(out)
        self._add(elementwise.finish, parts, y, bias, code, onto is not None, out, parts)
        return out

    def add_gated(self, x: Array, y: Array, gate: Array) -> None:
        self._by_rows(elementwise.add_gated, x, x, y, gate)

    def split(self, x: Array, parts: int) -> list[Array]:
        return np.split(x, parts, axis=1)

    def wkv4(self, r: Array, k: Array, v: Array, w: Array, u: Array, starts: Starts, state: Array) -> Array:
        y = self.empty(k.shape)
        parts = -(-k.shape[1] // wkv.CHANNELS) * len(state)
        self._add(wkv.wkv4, parts, r, k, v, w, u, starts, state, y)
        return y

    def wkv6(
        self, r: Array, k: Array, v: Array, w: Array, u: Array, norm: Norm, gate: Array | None, starts: Starts,
        state: Array,
    ) -> Array:  # fmt: skip
        y = self.empty(r.shape)
        self._add(wkv.wkv6, len(u) * len(state), r, k, v, w, u, *norm, gate, starts, state, y)
        return y

    def wkv7(
        self, r: Array, w: Array, k: Array, v: Array, a: Array, g: Array, residual: tuple[Array, Array] | None,
        k_k: Array, k_a: Array, r_k: Array, norm: Norm, starts: Starts, state: Array,
    ) -> Array:  # fmt: skip
        y = self.empty(r.shape)
        first, mix = residual or (None, None)
        self._add(
            wkv.wkv7, len(r_k) * len(state), r, w, k, v, a, g, first, mix, k_k, k_a, r_k, *norm, starts, state, y
        )  # fmt: skip
        return y

    def cross_entropy(self, logits: Array, targets: Array) -> Array:
        nll = self.empty((len(logits),), np.float64)
        self._by_rows(scores.cross_entropy, logits, logits, targets, nll)
        return nll

    def divergence(self, p: Array, q: Array) -> tuple[Array, Array]:
        kl, same = self.empty((len(p),), np.float64), self.empty((len(p),), np.bool_)
        self._by_rows(scores.divergence, p, p, q, kl, same)
        return kl, same


def _by_size(weight: FloatWeight) -> tuple[Array | None, Array | None, int]:
    """Its bits as 16 and as 32 bits a number, one of them None, and its kind."""
    kind = elementwise.DTYPES.index(weight.dtype)
    return (None, weight.bits.view(np.uint32), kind) if kind == 0 else (weight.bits, None, kind)
