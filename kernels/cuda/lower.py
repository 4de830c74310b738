"""Lowers a program to launches of the GPU's kernels.

`rules` says what is one launch. Each step has a function here that appends its launch. Products have several kernels
for several numbers of rows, of which a run launches one.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from rwkv_cli.kernels import program as p
from rwkv_cli.kernels.cuda.device import (
    elementwise,
    halves,
    heads,
    levels,
    matmul,
    matmul_float,
    norms,
    scores,
    wkv4,
    wkv6,
    wkv7,
)
from rwkv_cli.kernels.cuda.device.compile import Kernel
from rwkv_cli.kernels.cuda.driver import capability
from rwkv_cli.kernels.cuda.executable import CudaProgram
from rwkv_cli.kernels.cuda.launches import AddressOf, Argument, Between, Blocks, Place, Table, Tiles, round_up
from rwkv_cli.kernels.cuda.lowering import NO_LEVELS, Lowering, forms_of
from rwkv_cli.kernels.cuda.rules import (
    FloatProducts,
    Int8Products,
    Multiply,
    NormShift,
    Rounded,
    RoundFactors,
    Step,
    steps_of,
)
from rwkv_cli.kernels.cuda.weights import CodeTable, FloatMatrix, Fragments, Int8Table
from rwkv_cli.numbers import FLOAT_DTYPES, GROUP


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
    mixes = {"table": Table(tuple(table)) if table else None, "mixes": len(table)}
    threads, few = norms.norm_threads(D), min(norms.SPREAD_ROWS, rows.most)
    spread = Blocks((-(-D // threads), Tiles(rows)), threads, Between(rows, 1, few))
    low.launches.add(norms.norm_shift(D, True), spread, **arguments, **mixes)
    if few < rows.most:
        alone = Blocks((1, Tiles(rows)), threads, Between(rows, few + 1, rows.most))
        low.launches.add(norms.norm_shift(D, False), alone, **arguments, table=None, mixes=0)
        if step.mixes:
            _round(low, step.mixes, few + 1)


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


# products


def _round_factors(low: Lowering, step: RoundFactors) -> None:
    for each in step.factors:
        low.new_levels(each)
    _round(low, step.factors)


def _round(low: Lowering, factors: Sequence[Rounded], first: int = 1) -> None:
    """Launches that round factors whose levels have their places, for runs with `first` rows or more."""
    table = [
        levels.FactorRow(**_read(low, each.x), K=p.columns_of(each.x), **low.levels(each)._asdict()) for each in factors
    ]
    (x, _), quads = factors[0], max(levels.QUADS * -(-p.columns_of(x) // GROUP) for x, _ in factors)
    rows, few = p.rows_of(x), min(matmul.MOST_TOKENS, p.rows_of(x).most)
    if first <= few:
        threads = min(levels.THREADS, quads)
        grid = -(-quads // threads), Tiles(rows), len(factors)
        low.launches.add(levels.quantize, Blocks(grid, threads, Between(rows, first, few)), table=Table(tuple(table)))
    if few < rows.most:
        threads = min(halves.ROW_THREADS, round_up(quads, 32))
        many = Blocks((Tiles(rows), len(factors)), threads, Between(rows, max(first, few + 1), rows.most))
        low.launches.add(halves.to_halves, many, table=Table(tuple(table)))


def _read(low: Lowering, x: p.Factor) -> dict[str, Any]:
    """x, delta and mix of a factor with their strides, as `FactorRow` names them."""
    if isinstance(x, p.Lerp):
        mix_stride = x.mix.columns if isinstance(x.mix, p.Value) else 0
        delta, mix = low.place(x.delta), low.at(x.mix)
        return {
            "x": low.place(x.x),
            "x_stride": x.x.columns,
            "delta": delta,
            "delta_stride": x.delta.columns,
            "mix": mix,
            "mix_stride": mix_stride,
        }
    return {**_plain(low, x), "delta": None, "delta_stride": 0, "mix": None, "mix_stride": 0}


def _plain(low: Lowering, x: p.Value | p.Columns) -> dict[str, Any]:
    """x and its stride."""
    if isinstance(x, p.Value):
        return {"x": low.place(x), "x_stride": x.columns}
    base, offset = low.place(x.x)
    return {"x": Place(base, offset + 4 * x.first), "x_stride": x.x.columns}


def _int8_products(low: Lowering, step: Int8Products) -> None:
    """Launches for the parts whose weights have as many bits, and whose factors have."""
    of_a_kind: dict[tuple[int, int], list[Multiply]] = {}
    for part in step.parts:
        assert isinstance(part.product.weight, Fragments)
        kind = part.product.weight.bits, levels.PLANES[part.reads.bits]
        of_a_kind.setdefault(kind, []).append(part)
    for kind, parts in of_a_kind.items():
        _products_of(low, kind, parts)


def _products_of(low: Lowering, kind: tuple[int, int], parts: list[Multiply]) -> None:
    """A launch for one token, and one for each form of `matmul` that several tokens may need."""
    table = Table(tuple(_product_row(low, part) for part in parts))
    first, *_ = parts
    rows, count = first.out.rows, len(parts)
    strips, groups = (max(getattr(part.product.weight, name) for part in parts) for name in ("strips", "groups"))
    # A warp for each group of columns, as far as that goes.
    warps = min(groups, matmul.warps(strips * count))
    one = Blocks((-(-strips // 2), count), 64 * warps, Between(rows, 1, 1))
    low.launches.add(matmul.matvec(*kind), one, table=table)
    for form, only in forms_of(rows):
        if only.first <= only.last:
            grid = -(-strips // form.strips), Tiles(rows, form.tokens), count
            many = Blocks(grid, 32 * (min(groups, form.warps) if form.shares else form.warps), only)
            low.launches.add(form.kernel(*kind), many, table=table, T=rows)


def _product_row(low: Lowering, part: Multiply) -> matmul.ProductRow:
    product, weight = part.product, part.product.weight
    assert isinstance(weight, Fragments)
    x = low.levels(part.reads)
    if part.add:
        y, put = low.place(part.out), NO_LEVELS
    else:
        y, put = low.new(part.out), low.new_levels_if_wanted(part.out)
    return matmul.ProductRow(
        weights=weight.values,
        scales=weight.scales,
        strips=weight.strips,
        groups=weight.groups,
        levels=x.levels,
        factors=x.factors,
        unit=weight.unit,
        rows=weight.rows,
        bias=product.bias,
        activation=p.ACTIVATIONS.index(product.activation),
        add=part.add,
        y=y,
        y_stride=part.out.columns,
        N=part.out.columns,
        y_levels=put.levels,
        y_factors=put.factors,
        y_planes=put.planes,
    )


def _float_products(low: Lowering, step: FloatProducts) -> None:
    """Launches for the parts whose weights have the same type."""
    by_kind: dict[int, list[Multiply]] = {}
    for part in step.parts:
        assert isinstance(part.product.weight, FloatMatrix)
        by_kind.setdefault(FLOAT_DTYPES.index(part.product.weight.dtype), []).append(part)
    for kind, parts in by_kind.items():
        table = Table(tuple(_float_row(low, part) for part in parts))
        N, (first, *_), count = max(part.out.columns for part in parts), parts, len(parts)
        rows, least = first.out.rows, 2
        one = Blocks((-(-N // matmul_float.VECTOR_ROWS), count), matmul_float.VECTOR_THREADS, Between(rows, 1, 1))
        low.launches.add(matmul_float.matvec_float(kind), one, table=table)
        few, many = matmul_float.TILE_TOKENS
        for tokens, most in ((few, min(few, rows.most)), (many, rows.most)):
            if least <= most:
                grid, only = (-(-N // matmul_float.TILE_ROWS), Tiles(rows, tokens), count), Between(rows, least, most)
                blocks = Blocks(grid, matmul_float.TILE_THREADS, only)
                low.launches.add(matmul_float.matmul_float(kind, tokens), blocks, table=table, T=rows)
            least = most + 1


def _float_row(low: Lowering, part: Multiply) -> matmul_float.FloatRow:
    product, weight = part.product, part.product.weight
    assert isinstance(weight, FloatMatrix)
    N, K = weight.shape
    return matmul_float.FloatRow(
        **_read(low, product.x),
        K=K,
        weight=weight.bits,
        width=weight.width,
        bias=product.bias,
        activation=p.ACTIVATIONS.index(product.activation),
        add=part.add,
        y=low.place(part.out) if part.add else low.new(part.out),
        y_stride=N,
        N=N,
    )


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
            low.launches.add(kernel(N, form), Blocks((H, B), heads.threads(N), only), **arguments)
    puts = min(few, matmul.MOST_TOKENS)
    if put.levels is not None and puts < rows.most:
        _round(low, [low.rounded(op.out)], puts + 1)


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
    RoundFactors: _round_factors,
    Int8Products: _int8_products,
    FloatProducts: _float_products,
    p.Wkv4: _wkv4,
    p.Wkv6: _wkv6,
    p.Wkv7: _wkv7,
    p.CrossEntropy: _cross_entropy,
    p.Divergence: _divergence,
}
