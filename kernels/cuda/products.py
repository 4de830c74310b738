"""Lowers products and the rounding of what they read, with a kernel for each of several numbers of rows."""

from collections.abc import Sequence
from typing import Any

from rwkv_cli.kernels import program as p
from rwkv_cli.kernels.cuda.device import halves, levels, matmul, matmul_float
from rwkv_cli.kernels.cuda.launches import Between, Blocks, Place, Table, Tiles, round_up
from rwkv_cli.kernels.cuda.lowering import NO_LEVELS, Lowering, forms_of
from rwkv_cli.kernels.cuda.rules import FloatProducts, Int8Products, Multiply, Rounded, RoundFactors
from rwkv_cli.kernels.cuda.weights import FloatMatrix, Fragments
from rwkv_cli.numbers import FLOAT_DTYPES, GROUP


def round_factors(low: Lowering, step: RoundFactors) -> None:
    for each in step.factors:
        low.new_levels(each)
    round_to_levels(low, step.factors)


def round_to_levels(low: Lowering, factors: Sequence[Rounded], first: int = 1) -> None:
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


def int8_products(low: Lowering, step: Int8Products) -> None:
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


def float_products(low: Lowering, step: FloatProducts) -> None:
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
