"""Lowers a program to steps of the CPU's kernels: a function for each operation appends its steps.

`products` has the matrix products and what is fused with them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from rwkv_cli.kernels import program as p
from rwkv_cli.kernels.contract import Loadable, Watch
from rwkv_cli.kernels.cpu import elementwise, gates, packed, scores, wkv
from rwkv_cli.kernels.cpu.args import View
from rwkv_cli.kernels.cpu.lowering import PARTS_A_THREAD, Lowering, by_size
from rwkv_cli.kernels.cpu.products import add_linear, linear
from rwkv_cli.kernels.cpu.steps import Runnable, Share
from rwkv_cli.kernels.cpu.team import TEAM
from rwkv_cli.kernels.cpu.weights import FloatWeight, Int8Weight, PackedWeight
from rwkv_cli.numbers import FLOAT_DTYPES


class CpuProgram:
    """A program, compiled for the CPU (`contract.Executable`)."""

    def __init__(self, runnable: Runnable, outputs: Mapping[p.Value, View], threads: int) -> None:
        self._runnable, self._outputs, self._threads = runnable, outputs, threads

    def run(self, arrays: Mapping[str, NDArray[Any]], watch: Watch | None = None) -> None:
        self._runnable.run(self._threads, arrays, watch)

    def read(self, value: p.Value) -> NDArray[Any]:
        return self._runnable.read(self._outputs[value])


def lower(program: p.Program, threads: int) -> CpuProgram:
    """The program as steps for so many threads."""
    lowering = _lowered(program, threads)
    outputs = {value: lowering.view(value) for value in program.outputs}
    for view in outputs.values():
        lowering.steps.keep(view)
    return CpuProgram(lowering.steps.finish(program.inputs), outputs, threads)


def kernels(program: p.Program, threads: int) -> list[Loadable]:
    """The kernels of a program, each once, and the team's own."""
    return [TEAM, *dict.fromkeys(_lowered(program, threads).steps.kernels)]


def _lowered(program: p.Program, threads: int) -> Lowering:
    """The steps of all operations."""
    lowering = Lowering(threads)
    for operation in program.operations:
        LOWER[type(operation)](lowering, operation)
    return lowering


def _embed(low: Lowering, op: p.Embed) -> None:
    out, ids, table = low.place(op.out), low.view(op.ids), op.table
    if isinstance(table, Int8Weight):
        int8 = elementwise.EmbedInt8Args(ids, table.values, table.scales, table.unit, out)
        low.by_rows(elementwise.embed_int8, int8, out)
    elif isinstance(table, PackedWeight):
        codes = packed.EmbedCodesArgs(table.bits, ids, table.values, table.scales, table.rows, out)
        low.by_rows(packed.embed_codes, codes, out)
    else:
        assert isinstance(table, FloatWeight)
        low.by_rows(elementwise.embed_floats, elementwise.EmbedFloatsArgs(ids, *by_size(table), out), out)


def _layer_norm(low: Lowering, op: p.LayerNorm) -> None:
    norm, out = op.norm, low.place(op.out)
    arguments = elementwise.LayerNormArgs(low.view(op.x), norm.weight, norm.bias, norm.eps, out)
    low.by_rows(elementwise.layer_norm, arguments, out)


def _round_to(low: Lowering, op: p.RoundTo) -> None:
    if op.dtype == "F32":
        return
    x = low.view(op.x)
    low.by_rows(elementwise.round_to, elementwise.RoundToArgs(x, FLOAT_DTYPES.index(op.dtype)), x)


def _take_rows(low: Lowering, op: p.TakeRows) -> None:
    out = low.place(op.out)
    low.steps.add(
        elementwise.take, elementwise.TakeArgs(low.view(op.x), low.view(op.rows), out), Share.fixed(1, op.out.rows)
    )


def _token_shift(low: Lowering, op: p.TokenShift) -> None:
    delta, columns = low.place(op.out), op.x.columns
    arguments = elementwise.ShiftArgs(low.view(op.x), low.view(op.starts), low.view(op.last), delta, low.kept(op.last))
    parts = min(columns // 64 + 1, PARTS_A_THREAD * low.threads)
    low.steps.add(elementwise.shift, arguments, Share(op.x.rows, columns, parts, parts))


def _add_gated(low: Lowering, op: p.AddGated) -> None:
    x = low.view(op.x)
    low.by_rows(gates.add_gated, gates.AddGatedArgs(x, low.view(op.y), low.view(op.gate)), x)


def _gate(low: Lowering, op: p.Gate) -> None:
    x = low.view(op.x)
    low.by_rows(gates.gate, gates.GateArgs(x, low.view(op.gate)), x)


def _row_products(low: Lowering, op: p.RowProducts) -> None:
    matrices = low.view(op.matrices)
    low.by_rows(gates.row_products, gates.RowProductsArgs(low.view(op.x), matrices, low.place(op.out)), matrices)


def _wkv4(low: Lowering, op: p.Wkv4) -> None:
    state = low.view(op.state)
    arguments = wkv.Wkv4Args(
        r=low.view(op.receptance),
        k=low.view(op.key),
        v=low.view(op.value),
        decay=op.decay,
        bonus=op.bonus,
        starts=low.view(op.starts),
        state=state,
        kept=low.kept(op.state),
        y=low.place(op.out),
    )
    low.steps.add(wkv.wkv4, arguments, Share.fixed(-(-op.key.columns // wkv.CHANNELS) * state.shape[0]))


def _wkv6(low: Lowering, op: p.Wkv6) -> None:
    state, norm = low.view(op.state), op.norm
    arguments = wkv.Wkv6Args(
        r=low.view(op.receptance),
        k=low.view(op.key),
        v=low.view(op.value),
        decay=low.view(op.decay),
        shared_decay=not isinstance(op.decay, p.Value),
        bonus=op.bonus,
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
        gate=low.view(op.gate),
        starts=low.view(op.starts),
        state=state,
        kept=low.kept(op.state),
        y=low.place(op.out),
    )
    low.steps.add(wkv.wkv6, arguments, Share.fixed(len(op.bonus) * state.shape[0]))


def _wkv7(low: Lowering, op: p.Wkv7) -> None:
    state, norm, residual = low.view(op.state), op.norm, op.residual
    arguments = wkv.Wkv7Args(
        r=low.view(op.receptance),
        decay=low.view(op.decay),
        k=low.view(op.key),
        v=low.view(op.value),
        rate=low.view(op.rate),
        gate=low.view(op.gate),
        first=low.view(residual.first) if residual else None,
        mix=low.view(residual.gate) if residual else None,
        key_scale=op.key_scale,
        key_rate=op.key_rate,
        bonus=op.bonus,
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
        starts=low.view(op.starts),
        state=state,
        kept=low.kept(op.state),
        y=low.place(op.out),
    )
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
    p.Linear: linear,
    p.AddLinear: add_linear,
    p.AddGated: _add_gated,
    p.Gate: _gate,
    p.RowProducts: _row_products,
    p.Wkv4: _wkv4,
    p.Wkv6: _wkv6,
    p.Wkv7: _wkv7,
    p.CrossEntropy: _cross_entropy,
    p.Divergence: _divergence,
}
"""The functions that append the steps of each kind of operation."""
