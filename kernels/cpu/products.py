"""Lowers matrix products to steps. What is fused, and why:

- A factor that several products read is rounded once (`_factors`), and a lerp is computed while it is rounded.
- Products of one `Linear` run at the same time, with one barrier after all of them.
- Bias and activation are taken in the product's own kernel where the weight's rows are whole strips (`_product`).
- `AddLinear` sums into the residual stream in place where it can.
- A few tokens read only the columns of a sparse weight whose input is not zero (`_sparse_product`).
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rwkv_cli.kernels import program as p
from rwkv_cli.kernels.contract import activation_bits
from rwkv_cli.kernels.cpu import columns, elementwise, matmul, packed, rounding
from rwkv_cli.kernels.cpu.args import View
from rwkv_cli.kernels.cpu.compile import Kernel
from rwkv_cli.kernels.cpu.llvm.int8_dot import STRIP
from rwkv_cli.kernels.cpu.lowering import PARTS_A_THREAD, Lowering, by_size
from rwkv_cli.kernels.cpu.steps import Share
from rwkv_cli.kernels.cpu.weights import FloatWeight, Int8Weight, PackedWeight
from rwkv_cli.numbers import GROUP

_PART_BYTES = 1 << 18
"""Bytes of weights that one thread takes at a time when decoding. This is a few microseconds of work."""
_NARROW = 64
"""Outputs below which blocks of a sparse weight are not cut further."""


class Rounded(NamedTuple):
    """Activations as integers of some bits (see `rounding`)."""

    bits: int
    levels: View
    factors: View
    offsets: View


@dataclass(frozen=True)
class Ending:
    """The work that is left on a product: a bias and an activation, or to add it to `onto`."""

    activation: int = 0
    bias: Any = None
    onto: View | None = None

    @property
    def nothing(self) -> bool:
        return not self.activation and self.bias is None and self.onto is None


def linear(low: Lowering, op: p.Linear) -> None:
    factors = _factors(low, [(product.x, product.weight) for product in op.products])
    for product, factor, out in zip(op.products, factors, op.out, strict=True):
        ending = Ending(p.ACTIVATIONS.index(product.activation), product.bias)
        low.put(out, _product(low, factor, product.weight, out.rows, ending))
    low.steps.barrier()


def add_linear(low: Lowering, op: p.AddLinear) -> None:
    (factor,) = _factors(low, [(op.y, op.weight)])
    _product(low, factor, op.weight, op.x.rows, Ending(onto=low.view(op.x)))
    low.steps.barrier()


def _factors(low: Lowering, reads: list[tuple[p.Factor, p.Weight]]) -> list[View | Rounded]:
    """The factor of each product: float32 for a float matrix, integers for any other. Each is made once."""
    made: dict[tuple[int, int | None], View | Rounded] = {}
    keys = [(id(x), _bits(x, weight)) for x, weight in reads]
    for key, (x, _) in zip(keys, reads, strict=True):
        if key not in made:
            _, bits = key
            made[key] = _plain(low, x) if bits is None else round_factor(low, x, bits)
    low.steps.barrier()
    return [made[key] for key in keys]


def _bits(x: p.Factor, weight: p.Weight) -> int | None:
    """The bits to which a factor is rounded for a weight; None for a float matrix."""
    if isinstance(weight, FloatWeight):
        return None
    return activation_bits(x, weight.bits if isinstance(weight, PackedWeight) else 8, weight.skips_zeros)


def work(product: p.Product) -> float:
    """The multiply-adds of a product with one row, each as much as what it takes of one with 15 bits."""
    bits = _bits(product.x, product.weight) or 15
    return math.prod(product.weight.shape) * rounding.SHAPES[bits][0] / rounding.SHAPES[15][0]


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


def round_factor(low: Lowering, x: p.Factor, bits: int) -> Rounded:
    """A factor as integers of some bits."""
    rows, columns = p.rows_of(x), p.columns_of(x)
    groups = -(-columns // GROUP)
    rounded = Rounded(
        bits,
        low.steps.empty((rows, groups, *rounding.SHAPES[bits]), rounding.LEVEL),
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
        x=source,
        stride=4 * source.shape[1],
        tokens=rows,
        columns=columns,
        delta=delta,
        mix=mix,
        mix_stride=mix_stride,
        bits=bits,
        levels=rounded.levels,
        factors=rounded.factors,
        offsets=rounded.offsets,
    )
    low.steps.add(
        rounding.quantize, arguments, Share(rows, columns, groups, PARTS_A_THREAD * low.threads), barrier=False
    )
    return rounded


def _product(low: Lowering, x: View | Rounded, weight: p.Weight, rows: p.Count, ending: Ending) -> View:
    """The product of a factor and a weight, ended as `ending` says."""
    N = weight.shape[0]
    if isinstance(weight, FloatWeight):
        assert isinstance(x, View)
        y = low.steps.empty((rows, N))
        parts = min(-(-N // 4), PARTS_A_THREAD * low.threads)
        low.steps.add(matmul.floats, matmul.FloatsArgs(*by_size(weight), x, y), Share.fixed(parts, rows))
        return _finished(low, y, N, ending)
    assert isinstance(weight, Int8Weight | PackedWeight)
    assert isinstance(x, Rounded)
    padded = _padded_rows(weight)
    # Into place if every output is one of the matrix's own, and the kernel has a use for bias and activation.
    direct = padded == N and (not weight.skips_zeros or (ending.bias is None and not ending.activation))
    own = ending if direct else Ending()
    y = low.steps.empty((rows, padded)) if own.onto is None else own.onto
    if weight.skips_zeros:
        _sparse_product(low, x, weight, y, own.onto is not None)
    elif isinstance(weight, PackedWeight):
        _packed_product(low, x, weight, y, own)
    else:
        _tiled_product(low, x, weight, y, own)
    return y if direct else _finished(low, y, N, ending)


def _padded_rows(weight: Int8Weight | PackedWeight) -> int:
    """The rows of a matrix with those that fill its last strip or block."""
    if isinstance(weight, PackedWeight):
        return int(weight.rows.size)
    return int(weight.values.shape[0] * weight.values.shape[2])


def _tiled_product(low: Lowering, x: Rounded, weight: Int8Weight, y: View, ending: Ending) -> None:
    rows = y.shape[0]
    assert isinstance(rows, p.Count)
    S, G = weight.scales.shape[:2]
    strips = _strips_per_part(low, rows, S, weight.nbytes // S)
    arguments = matmul.TilesArgs(
        values=weight.values,
        scales=weight.scales,
        strips=S,
        groups=G,
        unit=weight.unit,
        levels=x.levels,
        factors=x.factors,
        offsets=x.offsets,
        tokens=rows,
        y=y,
        bias=ending.bias,
        add=ending.onto is not None,
        activation=ending.activation,
        strips_per_part=strips,
    )
    low.steps.add(matmul.tiles, arguments, Share.fixed(-(-S // strips), rows), barrier=False)


def _packed_product(low: Lowering, x: Rounded, weight: PackedWeight, y: View, ending: Ending) -> None:
    rows = y.shape[0]
    assert isinstance(rows, p.Count)
    S = weight.rows.size // STRIP
    strips = _strips_per_part(low, rows, S, weight.nbytes // S)
    arguments = packed.CodesArgs(
        bits=weight.bits,
        values=weight.values,
        scales=weight.scales,
        rows=weight.rows,
        activation_bits=x.bits,
        levels=x.levels,
        factors=x.factors,
        offsets=x.offsets,
        tokens=rows,
        y=y,
        bias=ending.bias,
        add=ending.onto is not None,
        activation=ending.activation,
        strips_per_part=strips,
    )
    kernel = packed.tiles_one if rows.most == 1 else packed.tiles_many
    low.steps.add(kernel, arguments, Share.fixed(-(-S // strips), rows), barrier=False)


def _strips_per_part(low: Lowering, rows: p.Count, S: int, strip_bytes: int) -> int:
    """An even number: for one token as many as the bytes allow, for many as few as give every thread enough parts."""
    most = _PART_BYTES // strip_bytes
    if rows.most > 1:
        most = min(8 * most, S // (PARTS_A_THREAD * low.threads))
    return max(1, most // 2) * 2


def _sparse_product(low: Lowering, x: Rounded, weight: Int8Weight | PackedWeight, y: View, add: bool) -> None:
    rows = y.shape[0]
    assert isinstance(rows, p.Count)
    one, G = rows.most == 1, -(-weight.shape[1] // GROUP)
    numbers, count = low.steps.empty((G, GROUP), np.int64), low.steps.empty((G,), np.int64)
    nonzero = low.steps.empty((G, 1 if one else columns.MOST, GROUP), np.int16)
    bytes_, words = (x.levels, None) if rounding.VNNI else (None, x.levels)
    find = columns.NonzeroArgs(bytes_, words, rows, numbers, nonzero, count)
    low.steps.add(columns.find_nonzero, find, Share.fixed(min(G, 2 * low.threads), rows))
    # for one token, blocks are cut until every thread has as many pieces
    B, W = len(weight.values), weight.scales.shape[2]
    least = packed.CHUNK if isinstance(weight, PackedWeight) else _NARROW
    width = W if one else min(W, least)
    while B * (W // width) % low.threads and width > least:
        width //= 2
    # many tokens share two strips, which is work enough for a part
    outputs = width if one else min(W, 2 * STRIP)
    share = Share.fixed(B * (W // outputs), rows)
    kernel: Kernel = columns.columns
    arguments: type[Any] = columns.ColumnsArgs
    of_weight: dict[str, Any] = {"values": weight.values, "scales": weight.scales}
    if isinstance(weight, PackedWeight):
        kernel, arguments = packed.columns, packed.CodeColumnsArgs
        of_weight |= {"bits": weight.bits, "by_row": weight.rows}
    else:
        of_weight["unit"] = weight.unit
    record = arguments(
        **of_weight,
        levels=x.levels,
        factors=x.factors,
        offsets=x.offsets,
        tokens=rows,
        rows=numbers,
        nonzero=nonzero,
        count=count,
        y=y,
        add=add,
        width=width,
    )
    low.steps.add(kernel, record, share, barrier=False)


def _finished(low: Lowering, y: View, N: int, ending: Ending) -> View:
    """The first N columns of y, with what its kernel has left to do."""
    low.steps.barrier()
    if ending.nothing and y.shape[1] == N:
        return y
    out = low.steps.empty((y.shape[0], N)) if ending.onto is None else ending.onto
    arguments = elementwise.FinishArgs(y, ending.bias, ending.activation, ending.onto is not None, out)
    low.by_rows(elementwise.finish, arguments, out)
    return out
