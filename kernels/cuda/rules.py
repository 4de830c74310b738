"""Rules that say what is one launch: they turn a program's operations into steps. None of them needs a GPU.

1. `join_norms`: a layer norm and the token shift of its result are one launch.
2. `gather_products`: all products of one `Linear` that are made in int8 are one step, a launch for each number of bits
   that the weights and the rounded factors have. Those with float matrices are another, a launch for each type.
3. `insert_rounding`: the factors of that step are rounded in one launch before it. A factor whose own kernel can put
   its levels is not among them.
4. `join_rounding`: if all of them are mixes of a norm and its shift just before, that launch rounds them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rwkv_cli.kernels import program as p
from rwkv_cli.kernels.contract import activation_bits
from rwkv_cli.kernels.cuda.device.heads import puts_levels
from rwkv_cli.kernels.cuda.weights import Fragments


class Rounded(NamedTuple):
    """A factor as integers of 8 or 15 bits."""

    x: p.Factor
    bits: int


@dataclass(frozen=True, eq=False)
class NormShift:
    """A layer norm, the token shift of its result, and mixes of both that are rounded to levels."""

    norm: p.LayerNorm
    shift: p.TokenShift
    mixes: tuple[Rounded, ...] = ()


@dataclass(frozen=True, eq=False)
class Multiply:
    """A product that becomes `out`, or is added to it."""

    product: p.Product
    out: p.Value
    add: bool = False

    @property
    def reads(self) -> Rounded:
        """The factor of a product in int8, as it reads it."""
        x, weight = self.product.x, self.product.weight
        assert isinstance(weight, Fragments)
        return Rounded(x, activation_bits(x, weight.bits, weight.by_columns))


@dataclass(frozen=True, eq=False)
class RoundFactors:
    """Round each factor to levels."""

    factors: tuple[Rounded, ...]


@dataclass(frozen=True, eq=False)
class Int8Products:
    """Products of the same rows with matrices of int8 or codes."""

    parts: tuple[Multiply, ...]


@dataclass(frozen=True, eq=False)
class FloatProducts:
    """Products of the same rows with float matrices."""

    parts: tuple[Multiply, ...]


Step = p.Operation[Any] | NormShift | RoundFactors | Int8Products | FloatProducts


def steps_of(operations: Sequence[p.Operation[Any]]) -> tuple[list[Step], dict[p.Value, int]]:
    """The steps of a program, and the bits of the values that get their levels from the kernel that computes them."""
    steps, with_levels = insert_rounding(gather_products(join_norms(operations)))
    return join_rounding(steps), with_levels


def join_norms(steps: Sequence[Step]) -> list[Step]:
    """Join each layer norm with the token shift of its result, if that is the next step."""
    joined: list[Step] = []
    for step in steps:
        match joined[-1:], step:
            case [p.LayerNorm() as norm], p.TokenShift() if step.x is norm.out:
                joined[-1] = NormShift(norm, step)
            case _:
                joined.append(step)
    return joined


def gather_products(steps: Sequence[Step]) -> list[Step]:
    """Gather the products in int8 of each Linear, and those with float matrices."""
    gathered: list[Step] = []
    for step in steps:
        if not isinstance(step, p.Linear | p.AddLinear):
            gathered.append(step)
            continue
        parts = list(_parts(step))
        int8 = tuple(part for part in parts if isinstance(part.product.weight, Fragments))
        if int8:
            gathered.append(Int8Products(int8))
        if floats := tuple(part for part in parts if part not in int8):
            gathered.append(FloatProducts(floats))
    return gathered


def _parts(operation: p.Linear | p.AddLinear) -> Iterator[Multiply]:
    """Each product of an operation, and where it goes."""
    if isinstance(operation, p.Linear):
        yield from map(Multiply, operation.products, operation.out)
    else:
        yield Multiply(p.Product(operation.y, operation.weight), operation.x, add=True)


def insert_rounding(steps: Sequence[Step]) -> tuple[list[Step], dict[p.Value, int]]:
    """Insert a step that rounds the factors of each Int8Products; the values whose own kernel is to put their levels.

    These are the factors that such a kernel has computed (`computed_with_levels`) and nothing has changed since. It
    puts integers of as many bits as their first reader wants.
    """
    inserted: list[Step] = []
    fresh: dict[p.Value, tuple[int, ...]] = {}
    wanted: dict[p.Value, int] = {}
    for step in steps:
        if isinstance(step, Int8Products):
            left = []
            for x, bits in dict.fromkeys(part.reads for part in step.parts):
                own = isinstance(x, p.Value) and bits in fresh.get(x, ()) and wanted.setdefault(x, bits) == bits
                if not own:
                    left.append(Rounded(x, bits))
            if left:
                inserted.append(RoundFactors(tuple(left)))
        inserted.append(step)
        for x in changed_by(step):
            fresh.pop(x, None)
        fresh |= computed_with_levels(step)
    return inserted, wanted


def join_rounding(steps: Sequence[Step]) -> list[Step]:
    """Join each norm and shift with the rounding that is the next step, if it rounds nothing but mixes of theirs."""
    joined: list[Step] = []
    for step in steps:
        match joined[-1:], step:
            case [NormShift() as before], RoundFactors() if all(_is_mix(x, before) for x, _ in step.factors):
                joined[-1] = NormShift(before.norm, before.shift, step.factors)
            case _:
                joined.append(step)
    return joined


def _is_mix(x: p.Factor, step: NormShift) -> bool:
    """True if a factor is the result of a norm, or that and some of its shift by a vector that all rows share."""
    if isinstance(x, p.Lerp):
        return x.x is step.norm.out and x.delta is step.shift.out and not isinstance(x.mix, p.Value)
    return x is step.norm.out


def computed_with_levels(step: Step) -> dict[p.Value, tuple[int, ...]]:
    """The values that a step computes with a kernel that can put their levels too, and the bits that it can put.

    Such kernels are the product with one token, and a recurrence whose heads are whole groups of columns.
    """
    match step:
        case Int8Products():
            return {part.out: (8, 15) for part in step.parts if part.out.rows.most == 1 and not part.add}
        case p.Wkv6() | p.Wkv7():
            _, head_size = step.bonus.shape
            return {step.out: (15,)} if puts_levels(head_size) else {}
    return {}


def changed_by(step: Step) -> set[p.Value]:
    """The values that a step changes in place."""
    match step:
        case Int8Products() | FloatProducts():
            return {part.out for part in step.parts if part.add}
        case p.AddGated() | p.Gate() | p.RoundTo():
            return {step.x}
    return set()
