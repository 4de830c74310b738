"""Lowers a program to launches of the GPU's kernels.

`rules` says what is one launch. Each step has a function, here or in `products`, that appends its launch. Some have
several kernels for several numbers of rows, of which a run launches one.
"""

from collections.abc import Callable
from math import prod
from typing import Any

from rwkv_cli.kernels import program as p
from rwkv_cli.kernels.cuda import products
from rwkv_cli.kernels.cuda.device import (
    elementwise,
    heads,
    matmul,
    norms,
    scores,
    wkv4,
    wkv6,
    wkv7,
)
from rwkv_cli.kernels.cuda.device.compile import Kernel
from rwkv_cli.kernels.cuda.driver import capability
from rwkv_cli.kernels.cuda.executable import CudaProgram
from rwkv_cli.kernels.cuda.launches import AddressOf, Argument, Between, Blocks, Table, Tiles
from rwkv_cli.kernels.cuda.lowering import Lowering
from rwkv_cli.kernels.cuda.rules import (
    FloatProducts,
    Int8Products,
    NormShift,
    RoundFactors,
    Step,
    steps_of,
)
from rwkv_cli.kernels.cuda.weights import CodeTable, FloatMatrix, Int8Table
from rwkv_cli.numbers import FLOAT_DTYPES


def lower(program: p.Program) -> CudaProgram:
    """The program as launches."""
    steps, with_levels = steps_of(program.operations)
    lowering = Lowering(with_levels)
    for step in steps:
        LOWER[type(step)](lowering, step)
    outputs = {value: lowering.place(value) for value in program.outputs}
    for place in outputs.values():
        lowering.launches.keep(place)
    return CudaProgram(lowering.launches, program.inputs, outputs)


# rows in and out


def _embed(low: Lowering, op: p.Embed) -> None:
    ids, table, out, D = low.place(op.ids), op.table, low.new(op.out), op.out.columns
    if isinstance(table, FloatMatrix):
        bits, kind, width = table.bits, FLOAT_DTYPES.index(table.dtype), table.width
        low.by_columns(elementwise.embed_float, op.out, ids=ids, table=bits, kind=kind, out=out, D=D, width=width)
        return
    if isinstance(table, CodeTable):
        codes = {name: getattr(table, name) for name in ("values", "scales", "rows", "levels", "bits")}
        low.by_columns(elementwise.embed_codes, op.out, ids=ids, **codes, out=out, D=D)
        return
    assert isinstance(table, Int8Table)
    values, scales, unit, width = table.values, table.scales, table.unit, table.width
    low.by_columns(
        elementwise.embed_int8, op.out, ids=ids, values=values, scales=scales, unit=unit, out=out, D=D, width=width
    )


def _layer_norm(low: Lowering, op: p.LayerNorm) -> None:
    low.by_rows(norms.layer_norm(op.x.columns), op.x, **_normed(low, op))


def _normed(low: Lowering, op: p.LayerNorm) -> dict[str, Argument]:
    """The arguments for a layer norm."""
    norm, x, out = op.norm, low.place(op.x), low.new(op.out)
    return {"x": x, "weight": norm.weight, "bias": norm.bias, "out": out, "eps": norm.eps, "D": op.x.columns}


def _token_shift(low: Lowering, op: p.TokenShift) -> None:
    x, delta = low.place(op.x), low.new(op.out)
    low.by_rows(norms.shift, op.x, x=x, delta=delta, **_last_rows(low, op), D=op.x.columns)


def _norm_shift(low: Lowering, step: NormShift) -> None:
    """One launch for few rows, which are spread over blocks. Mixes of many are rounded by a launch of their own."""
    D, rows = step.norm.x.columns, step.norm.x.rows
    arguments = _normed(low, step.norm) | {"delta": low.new(step.shift.out)} | _last_rows(low, step.shift)
    for each in step.mixes:
        low.new_levels(each)
    table = [norms.MixRow(_mix(low, each.x), *low.levels(each)) for each in step.mixes]
    threads, few = norms.norm_threads(D), min(norms.SPREAD_ROWS, rows.most)
    spread = Blocks((-(-D // threads), Tiles(rows)), threads, Between(rows, 1, few))
    mixes = Table(tuple(table)) if table else None
    low.launches.add(norms.norm_shift(D, True, len(table)), spread, **arguments, table=mixes)
    if few < rows.most:
        alone = Blocks((1, Tiles(rows)), threads, Between(rows, few + 1, rows.most))
        low.launches.add(norms.norm_shift(D, False, 0), alone, **arguments, table=None)
        if step.mixes:
            products.round_to_levels(low, step.mixes, few + 1)


def _mix(low: Lowering, x: p.Factor) -> Any:
    """The vector of a mix."""
    return low.at(x.mix) if isinstance(x, p.Lerp) else None


def _last_rows(low: Lowering, op: p.TokenShift) -> dict[str, Argument]:
    """The arguments that tell a token shift the sequences and the rows before them."""
    last, offset = AddressOf(op.last.array), _state_offset(op.last)
    return {"starts": low.place(op.starts), "last": last, "last_offset": offset, "B": _sequences(op.last)}


def _sequences(state: p.LayerState) -> int:
    """How many sequences a state is for."""
    _, B, *_ = state.array.shape
    assert isinstance(B, int)
    return B


def _state_offset(state: p.LayerState) -> int:
    """The offset of a layer's part of a state, in bytes."""
    _, *shape = state.array.shape
    return 4 * state.layer * prod(n for n in shape if isinstance(n, int))


def _round_to(low: Lowering, op: p.RoundTo) -> None:
    if op.dtype == "F32":
        return
    kind = FLOAT_DTYPES.index(op.dtype)
    low.by_columns(elementwise.round_to, op.x, x=low.place(op.x), kind=kind, D=op.x.columns)


def _take_rows(low: Lowering, op: p.TakeRows) -> None:
    x, rows, out = low.place(op.x), low.place(op.rows), low.new(op.out)
    low.by_columns(elementwise.take, op.out, x=x, rows=rows, out=out, D=op.x.columns)


def _add_gated(low: Lowering, op: p.AddGated) -> None:
    x, y, gate = low.place(op.x), low.place(op.y), low.place(op.gate)
    low.by_columns(elementwise.add_gated, op.x, x=x, y=y, gate=gate, D=op.x.columns)


def _gate(low: Lowering, op: p.Gate) -> None:
    low.by_columns(elementwise.gate, op.x, x=low.place(op.x), gate=low.place(op.gate), D=op.x.columns)


def _row_products(low: Lowering, op: p.RowProducts) -> None:
    x, matrices, out = low.place(op.x), low.place(op.matrices), low.new(op.out)
    K, N = op.x.columns, op.out.columns
    low.by_columns(elementwise.row_products, op.out, x=x, matrices=matrices, out=out, K=K, N=N)


# recurrences and scores


def _wkv4(low: Lowering, op: p.Wkv4) -> None:
    D = op.key.columns
    low.launches.add(
        wkv4.wkv4,
        Blocks((-(-D // wkv4.CHANNELS), _sequences(op.state)), wkv4.CHANNELS),
        r=low.place(op.receptance),
        k=low.place(op.key),
        v=low.place(op.value),
        w=op.decay,
        u=op.bonus,
        **_states(low, op),
        y=low.new(op.out),
        D=D,
    )


def _wkv6(low: Lowering, op: p.Wkv6) -> None:
    D, norm = op.receptance.columns, op.norm
    arguments = {
        "r": low.place(op.receptance),
        "k": low.place(op.key),
        "v": low.place(op.value),
        "w": low.at(op.decay),
        "w_stride": D if isinstance(op.decay, p.Value) else 0,
        "u": op.bonus,
        "weight": norm.weight,
        "bias": norm.bias,
        "eps": norm.eps,
        "gate": low.at(op.gate),
    }
    _by_heads(low, op, wkv6.wkv6, arguments)


def _wkv7(low: Lowering, op: p.Wkv7) -> None:
    first, gate = (low.place(op.residual.first), low.place(op.residual.gate)) if op.residual else (None, None)
    arguments = {
        "r": low.place(op.receptance),
        "w": low.place(op.decay),
        "k": low.place(op.key),
        "v": low.place(op.value),
        "a": low.place(op.rate),
        "g": low.place(op.gate),
        "v_first": first,
        "v_gate": gate,
        "k_k": op.key_scale,
        "k_a": op.key_rate,
        "r_k": op.bonus,
        "weight": op.norm.weight,
        "bias": op.norm.bias,
        "eps": op.norm.eps,
    }
    _by_heads(low, op, wkv7.wkv7, arguments)


def _by_heads(
    low: Lowering, op: p.Wkv6 | p.Wkv7, kernel: Callable[[int, heads.Form], Kernel], arguments: dict[str, Argument]
) -> None:
    """A recurrence whose block has a head of a sequence: a kernel for few tokens a sequence, and one for many."""
    (H, N), B, rows = op.bonus.shape, _sequences(op.state), op.out.rows
    arguments |= _states(low, op)
    y, put = low.new(op.out), low.new_levels_if_wanted(op.out)
    arguments |= {"y": y, "levels": put.levels, "factors": put.factors, "D": op.receptance.columns}
    few = min(heads.FEW_TOKENS * B, rows.most)
    forms = heads.forms(capability())
    for form, only in ((forms.few, Between(rows, 1, few)), (forms.many, Between(rows, few + 1, rows.most))):
        if only.first <= only.last:
            low.launches.add(kernel(N, form), Blocks((H, B), heads.threads(N, form), only), **arguments)
    puts = min(few, matmul.MOST_TOKENS)
    if put.levels is not None and puts < rows.most:
        products.round_to_levels(low, [low.rounded(op.out)], puts + 1)


def _states(low: Lowering, op: p.Wkv4 | p.Wkv6 | p.Wkv7) -> dict[str, Argument]:
    """The arguments that tell a recurrence the sequences and their states."""
    state = AddressOf(op.state.array)
    return {"starts": low.place(op.starts), "state": state, "offset": _state_offset(op.state)}


def _cross_entropy(low: Lowering, op: p.CrossEntropy) -> None:
    logits, targets, nll = low.place(op.logits), low.place(op.targets), low.new(op.out)
    low.by_rows(scores.cross_entropy, op.logits, logits=logits, targets=targets, nll=nll, V=op.logits.columns)


def _divergence(low: Lowering, op: p.Divergence) -> None:
    kl, same = map(low.new, op.out)
    low.by_rows(scores.divergence, op.p, p=low.place(op.p), q=low.place(op.q), kl=kl, same=same, V=op.p.columns)


LOWER: dict[type[Step], Callable[[Lowering, Any], None]] = {
    p.Embed: _embed,
    p.LayerNorm: _layer_norm,
    p.TokenShift: _token_shift,
    NormShift: _norm_shift,
    p.RoundTo: _round_to,
    p.TakeRows: _take_rows,
    p.AddGated: _add_gated,
    p.Gate: _gate,
    p.RowProducts: _row_products,
    RoundFactors: products.round_factors,
    Int8Products: products.int8_products,
    FloatProducts: products.float_products,
    p.Wkv4: _wkv4,
    p.Wkv6: _wkv6,
    p.Wkv7: _wkv7,
    p.CrossEntropy: _cross_entropy,
    p.Divergence: _divergence,
}
