"""Lowers a program to steps of the CPU's kernels.

Each operation has a function that appends its steps. What is fused, and why, stands beside it:

- A factor that several products read is rounded once (`_rounded`), and a lerp is computed while it is rounded.
- Products of one `Linear` run at the same time, with one barrier after all of them.
- Bias and activation are taken in the product's own kernel where the weight's rows are whole strips (`_product`).
- `AddLinear` sums into the residual stream in place where it can.
- One token reads only the rows of a sparse weight whose input is not zero (`_sparse_product`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels import program as p
from rwkv_cli.kernels.cpu import elementwise, matmul, rounding, scores, sparse, wkv
from rwkv_cli.kernels.cpu.args import View
from rwkv_cli.kernels.cpu.compile import Kernel
from rwkv_cli.kernels.cpu.llvm.int8_dot import STRIP
from rwkv_cli.kernels.cpu.steps import Runnable, Share, Steps
from rwkv_cli.kernels.cpu.weights import FloatWeight, Int8Weight
from rwkv_cli.numbers import FLOAT_DTYPES, GROUP

_PART_BYTES = 1 << 18
"""Bytes of weights that one thread takes at a time when decoding. This is a few microseconds of work."""
_PARTS = 8
"""Parts for each thread, where there is enough work: the last to finish is then not far behind."""
_NARROW = 64
"""Outputs below which blocks of a sparse weight are not cut further."""
_DTYPES = {"F32": np.float32, "F64": np.float64, "I64": np.int64, "BOOL": np.bool_}


class CpuProgram:
    """A program, compiled for the CPU (`contract.Executable`)."""

    def __init__(self, runnable: Runnable, outputs: Mapping[p.Value, View], threads: int) -> None:
        self._runnable, self._outputs, self._threads = runnable, outputs, threads

    def run(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._runnable.run(self._threads, arrays)

    def read(self, value: p.Value) -> NDArray[Any]:
        return self._runnable.read(self._outputs[value])


def lower(program: p.Program, threads: int) -> CpuProgram:
    """The program as steps for so many threads."""
    lowering = Lowering(threads)
    for operation in program.operations:
        LOWER[type(operation)](lowering, operation)
    outputs = {value: lowering.view(value) for value in program.outputs}
    for view in outputs.values():
        lowering.steps.keep(view)
    return CpuProgram(lowering.steps.finish(program.inputs), outputs, threads)


class Rounded(NamedTuple):
    """Activations as integers (see `rounding`)."""

    levels: View
    factors: View
    offsets: View


@dataclass(frozen=True)
class Ending:
    """What is left to do with a product: a bias and an activation, or to add it to `onto`."""

    activation: int = 0
    bias: Any = None
    onto: View | None = None

    @property
    def nothing(self) -> bool:
        return not self.activation and self.bias is None and self.onto is None


class Lowering:
    """The steps so far, and where each value lies."""

    def __init__(self, threads: int) -> None:
        self.threads, self.steps = threads, Steps()
        self._views: dict[p.Value, View] = {}

    def view(self, x: p.Value | p.Input | p.LayerState | Any) -> Any:
        """Where a value, an input or a layer's state lies; an array of the device's own is itself."""
        if isinstance(x, p.Input | p.InputMatrix):
            return View(x, x.shape, np.dtype(_DTYPES[x.dtype]))
        if isinstance(x, p.LayerState):
            shape = x.array.shape[1:]
            size = int(np.prod([n for n in shape if isinstance(n, int)])) * 4
            return View(x.array, shape, np.dtype(np.float32), x.layer * size)
        return self._views[x] if isinstance(x, p.Value) else x

    def place(self, value: p.Value) -> View:
        """Memory for a value that the next steps compute."""
        self._views[value] = self.steps.empty((value.rows, value.columns), _DTYPES[value.dtype])
        return self._views[value]

    def put(self, value: p.Value, view: View) -> None:
        """Say where a value lies that the steps so far compute."""
        self._views[value] = view

    def shared(self, rows: p.Count, columns: int) -> Share:
        """A share for a step whose rows are independent."""
        return Share(rows, columns, 1, _PARTS * self.threads)

    def by_rows(self, kernel: Kernel, arguments: NamedTuple, like: View, barrier: bool = True) -> None:
        """Append a step that shares out the rows of `like`."""
        rows, columns = like.shape
        assert isinstance(rows, p.Count)
        assert isinstance(columns, int)
        self.steps.add(kernel, arguments, self.shared(rows, columns), barrier)


# rows in and out


def _embed(low: Lowering, op: p.Embed) -> None:
    out, ids, table = low.place(op.out), low.view(op.ids), op.table
    if isinstance(table, Int8Weight):
        int8 = elementwise.EmbedInt8Args(ids, table.values, table.scales, table.unit, out)
        low.by_rows(elementwise.embed_int8, int8, out)
    else:
        assert isinstance(table, FloatWeight)
        low.by_rows(elementwise.embed_floats, elementwise.EmbedFloatsArgs(ids, *_by_size(table), out), out)


def _layer_norm(low: Lowering, op: p.LayerNorm) -> None:
    norm, out = op.norm, low.place(op.out)
    arguments = elementwise.LayerNormArgs(low.view(op.x), norm.weight, norm.bias, norm.eps, out)
    low.by_rows(elementwise.layer_norm, arguments, out)


def _round_to(low: Lowering, op: p.RoundTo) -> None:
    x = low.view(op.x)
    low.by_rows(elementwise.round_to, elementwise.RoundToArgs(x, FLOAT_DTYPES.index(op.dtype)), x)


def _take_rows(low: Lowering, op: p.TakeRows) -> None:
    out = low.place(op.out)
    low.steps.add(
        elementwise.take, elementwise.TakeArgs(low.view(op.x), low.view(op.rows), out), Share.fixed(1, op.out.rows)
    )  # fmt: skip


def _token_shift(low: Lowering, op: p.TokenShift) -> None:
    delta, columns = low.place(op.out), op.x.columns
    arguments = elementwise.ShiftArgs(low.view(op.x), low.view(op.starts), low.view(op.last), delta)
    parts = min(columns // 64 + 1, _PARTS * low.threads)
    low.steps.add(elementwise.shift, arguments, Share(op.x.rows, columns, parts, parts))


def _add_gated(low: Lowering, op: p.AddGated) -> None:
    x = low.view(op.x)
    low.by_rows(elementwise.add_gated, elementwise.AddGatedArgs(x, low.view(op.y), low.view(op.gate)), x)


# products


def _linear(low: Lowering, op: p.Linear) -> None:
    factors = _rounded(low, [(product.x, product.weight) for product in op.products])
    for product, factor, out in zip(op.products, factors, op.out, strict=True):
        ending = Ending(p.ACTIVATIONS.index(product.activation), product.bias)
        low.put(out, _product(low, factor, product.weight, out.rows, ending))
    low.steps.barrier()


def _add_linear(low: Lowering, op: p.AddLinear) -> None:
    (factor,) = _rounded(low, [(op.y, op.weight)])
    _product(low, factor, op.weight, op.x.rows, Ending(onto=low.view(op.x)))
    low.steps.barrier()


def _rounded(low: Lowering, reads: list[tuple[p.Factor, p.Weight]]) -> list[View | Rounded]:
    """What each product reads: integers for an int8 matrix, float32 for a float matrix; each is made once."""
    made: dict[tuple[int, bool], View | Rounded] = {}
    keys = [(id(x), isinstance(weight, Int8Weight)) for x, weight in reads]
    for key, (x, weight) in zip(keys, reads, strict=True):
        if key not in made:
            made[key] = _round(low, x) if isinstance(weight, Int8Weight) else _plain(low, x)
    low.steps.barrier()
    return [made[key] for key in keys]


def _plain(low: Lowering, x: p.Factor) -> View:
    """A factor as a contiguous array."""
    if isinstance(x, p.Value):
        return low.view(x)  # type: ignore[no-any-return]
    rows, columns = p.rows_of(x), p.columns_of(x)
    out = low.steps.empty((rows, columns))
    if isinstance(x, p.Lerp):
        shared = not isinstance(x.mix, p.Value)
        lerp = elementwise.LerpArgs(low.view(x.x), low.view(x.delta), low.view(x.mix), shared, out)
        low.by_rows(elementwise.lerp, lerp, out, barrier=False)
    else:
        part = elementwise.TakeColumnsArgs(low.view(x.x), x.first, out)
        low.by_rows(elementwise.take_columns, part, out, barrier=False)
    return out


def _round(low: Lowering, x: p.Factor) -> Rounded:
    """A factor as integers."""
    rows, columns = p.rows_of(x), p.columns_of(x)
    groups = -(-columns // GROUP)
    rounded = Rounded(
        low.steps.empty((rows, groups, rounding.PLANES, GROUP), rounding.LEVEL),
        low.steps.empty((rows, groups)),
        low.steps.empty((rows, groups), np.int32),
    )
    delta, mix, mix_stride = None, None, 0
    if isinstance(x, p.Lerp):
        delta, mix = low.view(x.delta), low.view(x.mix)
        mix_stride = 4 * columns if isinstance(x.mix, p.Value) else 0
    source = low.view(x if isinstance(x, p.Value) else x.x)
    if isinstance(x, p.Columns):
        source = source._replace(offset=source.offset + 4 * x.first)
    arguments = rounding.QuantizeArgs(
        x=source, stride=4 * source.shape[1], tokens=rows, columns=columns, delta=delta, mix=mix,
        mix_stride=mix_stride, levels=rounded.levels, factors=rounded.factors, offsets=rounded.offsets,
    )  # fmt: skip
    low.steps.add(rounding.quantize, arguments, Share(rows, columns, groups, _PARTS * low.threads), barrier=False)
    return rounded


def _product(
    low: Lowering, x: View | Rounded, weight: p.Weight, rows: p.Count, ending: Ending
) -> View:  # fmt: skip
    """The product of a factor and a weight, ended as `ending` says."""
    N = weight.shape[0]
    if isinstance(weight, FloatWeight):
        assert isinstance(x, View)
        y = low.steps.empty((rows, N))
        parts = min(-(-N // 4), _PARTS * low.threads)
        low.steps.add(matmul.floats, matmul.FloatsArgs(*_by_size(weight), x, y), Share.fixed(parts, rows))
        return _finished(low, y, N, ending)
    assert isinstance(weight, Int8Weight)
    assert isinstance(x, Rounded)
    padded = weight.values.shape[0] * weight.values.shape[2]
    tile = weight.layout == "tile"
    # Into place if every output is one of the matrix's own, and the kernel has a use for bias and activation.
    direct = padded == N and (tile or (ending.bias is None and not ending.activation))
    own = ending if direct else Ending()
    y = low.steps.empty((rows, padded)) if own.onto is None else own.onto
    if tile:
        _tiled_product(low, x, weight, y, own)
    elif rows.most == 1:
        _sparse_product(low, x, weight, y, own.onto is not None)
    else:
        columns = matmul.ColumnsArgs(weight.values, weight.scales, weight.unit, *x, rows, y, own.onto is not None)
        parts = padded // min(2 * STRIP, weight.values.shape[2])
        low.steps.add(matmul.columns, columns, Share.fixed(parts, rows), barrier=False)
    return y if direct else _finished(low, y, N, ending)


def _tiled_product(low: Lowering, x: Rounded, weight: Int8Weight, y: View, ending: Ending) -> None:
    rows = y.shape[0]
    assert isinstance(rows, p.Count)
    S, G = weight.scales.shape[:2]
    strips = _strips_per_part(low, rows, S, G)
    arguments = matmul.TilesArgs(
        values=weight.values, scales=weight.scales, strips=S, groups=G, unit=weight.unit, levels=x.levels,
        factors=x.factors, offsets=x.offsets, tokens=rows, y=y, bias=ending.bias, add=ending.onto is not None,
        activation=ending.activation, strips_per_part=strips,
    )  # fmt: skip
    low.steps.add(matmul.tiles, arguments, Share.fixed(-(-S // strips), rows), barrier=False)


def _strips_per_part(low: Lowering, rows: p.Count, S: int, G: int) -> int:
    """For one token as many as the bytes allow; for many as few as give every thread enough parts."""
    size = G * (matmul.GROUP_BYTES + matmul.SCALE_BYTES)
    most = _PART_BYTES // size if rows.most == 1 else min(8 * _PART_BYTES // size, S // (_PARTS * low.threads))
    return max(1, most // matmul.STRIPS) * matmul.STRIPS


def _sparse_product(low: Lowering, x: Rounded, weight: Int8Weight, y: View, add: bool) -> None:
    rows = y.shape[0]
    assert isinstance(rows, p.Count)
    B, K, W = weight.values.shape
    G = K // GROUP
    numbers, nonzero = low.steps.empty((G, GROUP), np.int64), low.steps.empty((G, GROUP), np.int16)
    count = low.steps.empty((G,), np.int64)
    bytes_, words = (x.levels, None) if rounding.VNNI else (None, x.levels)
    find = sparse.NonzeroArgs(bytes_, words, numbers, nonzero, count)
    low.steps.add(sparse.find_nonzero, find, Share.fixed(min(G, 2 * low.threads), rows))
    # blocks are cut until every thread has as many pieces
    width = W
    while B * (W // width) % low.threads and width > _NARROW:
        width //= 2
    arguments = sparse.SparseArgs(
        values=weight.values, scales=weight.scales, unit=weight.unit, rows=numbers, nonzero=nonzero, count=count,
        factors=x.factors, y=y, add=add, width=width,
    )  # fmt: skip
    low.steps.add(sparse.sparse_columns, arguments, Share.fixed(B * (W // width), rows))


def _finished(low: Lowering, y: View, N: int, ending: Ending) -> View:
    """The first N columns of y, with what its kernel has left to do."""
    low.steps.barrier()
    if ending.nothing and y.shape[1] == N:
        return y
    out = low.steps.empty((y.shape[0], N)) if ending.onto is None else ending.onto
    arguments = elementwise.FinishArgs(y, ending.bias, ending.activation, ending.onto is not None, out)
    low.by_rows(elementwise.finish, arguments, out)
    return out


def _by_size(weight: FloatWeight) -> tuple[Any, Any, int]:
    """Its bits as 16 and as 32 bits a number, one of them None, and its type's number."""
    dtype = FLOAT_DTYPES.index(weight.dtype)
    return (None, weight.bits.view(np.uint32), dtype) if dtype == 0 else (weight.bits, None, dtype)


# recurrences and scores


def _wkv4(low: Lowering, op: p.Wkv4) -> None:
    state = low.view(op.state)
    arguments = wkv.Wkv4Args(
        r=low.view(op.receptance), k=low.view(op.key), v=low.view(op.value), decay=op.decay, bonus=op.bonus,
        starts=low.view(op.starts), state=state, y=low.place(op.out),
    )  # fmt: skip
    low.steps.add(wkv.wkv4, arguments, Share.fixed(-(-op.key.columns // wkv.CHANNELS) * state.shape[0]))


def _wkv6(low: Lowering, op: p.Wkv6) -> None:
    state, norm = low.view(op.state), op.norm
    arguments = wkv.Wkv6Args(
        r=low.view(op.receptance), k=low.view(op.key), v=low.view(op.value), decay=low.view(op.decay),
        shared_decay=not isinstance(op.decay, p.Value), bonus=op.bonus, weight=norm.weight, bias=norm.bias,
        eps=norm.eps, gate=low.view(op.gate), starts=low.view(op.starts), state=state, y=low.place(op.out),
    )  # fmt: skip
    low.steps.add(wkv.wkv6, arguments, Share.fixed(len(op.bonus) * state.shape[0]))


def _wkv7(low: Lowering, op: p.Wkv7) -> None:
    state, norm, residual = low.view(op.state), op.norm, op.residual
    arguments = wkv.Wkv7Args(
        r=low.view(op.receptance), decay=low.view(op.decay), k=low.view(op.key), v=low.view(op.value),
        rate=low.view(op.rate), gate=low.view(op.gate), first=low.view(residual.first) if residual else None,
        mix=low.view(residual.gate) if residual else None, key_scale=op.key_scale, key_rate=op.key_rate,
        bonus=op.bonus, weight=norm.weight, bias=norm.bias, eps=norm.eps, starts=low.view(op.starts), state=state,
        y=low.place(op.out),
    )  # fmt: skip
    low.steps.add(wkv.wkv7, arguments, Share.fixed(len(op.bonus) * state.shape[0]))


def _cross_entropy(low: Lowering, op: p.CrossEntropy) -> None:
    logits = low.view(op.logits)
    arguments = scores.CrossEntropyArgs(logits, low.view(op.targets), low.place(op.out))
    low.by_rows(scores.cross_entropy, arguments, logits)


def _divergence(low: Lowering, op: p.Divergence) -> None:
    kl, same = map(low.place, op.out)
    logits = low.view(op.p)
    low.by_rows(scores.divergence, scores.DivergenceArgs(logits, low.view(op.q), kl, same), logits)


LOWER: dict[type[p.Operation[Any]], Callable[[Lowering, Any], None]] = {
    p.Embed: _embed,
    p.LayerNorm: _layer_norm,
    p.RoundTo: _round_to,
    p.TakeRows: _take_rows,
    p.TokenShift: _token_shift,
    p.Linear: _linear,
    p.AddLinear: _add_linear,
    p.AddGated: _add_gated,
    p.Wkv4: _wkv4,
    p.Wkv6: _wkv6,
    p.Wkv7: _wkv7,
    p.CrossEntropy: _cross_entropy,
    p.Divergence: _divergence,
}
"""What appends the steps of each kind of operation."""
