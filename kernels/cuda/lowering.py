"""A program being lowered: its launches so far, and where each value and its levels lie."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from rwkv_cli.kernels import program as p
from rwkv_cli.kernels.cuda.device import halves, levels, matmul
from rwkv_cli.kernels.cuda.device.compile import Kernel
from rwkv_cli.kernels.cuda.launches import Argument, Between, Blocks, Launches, Place, Tiles, round_up
from rwkv_cli.kernels.cuda.rules import Rounded
from rwkv_cli.kernels.memory import NUMPY_DTYPES
from rwkv_cli.numbers import GROUP


class Levels(NamedTuple):
    """A factor as integers (see `levels`)."""

    levels: Place | None
    factors: Place | None
    planes: int


NO_LEVELS = Levels(None, None, 0)


class Lowering:
    """The launches so far, and where each value lies."""

    def __init__(self, with_levels: dict[p.Value, int]) -> None:
        self.launches = Launches()
        self._with_levels = with_levels
        self._places: dict[p.Value, Place] = {}
        self._levels: dict[Rounded, Levels] = {}

    def place(self, x: p.Value | p.Input) -> Place:
        """The place of a value or an input."""
        return Place(x) if isinstance(x, p.Input | p.InputMatrix) else self._places[x]

    def at(self, x: p.Value | p.Array | None) -> Any:
        """The place of a value. An array of the device's own, and None, stay what they are."""
        return self.place(x) if isinstance(x, p.Value) else x

    def new(self, value: p.Value) -> Place:
        """Memory for a value that the next launch computes."""
        numbers = value.rows.most * value.columns
        self._places[value] = self.launches.buffer(numbers * NUMPY_DTYPES[value.dtype].itemsize)
        return self._places[value]

    def levels(self, of: Rounded) -> Levels:
        """The places of a factor's levels."""
        return self._levels[of]

    def new_levels(self, of: Rounded) -> Levels:
        """Memory for the levels of a factor, in whole blocks of the kernel that reads them."""
        rows, columns, planes = p.rows_of(of.x), p.columns_of(of.x), levels.PLANES[of.bits]
        most_planes = planes if rows.most <= matmul.MOST_TOKENS else 2  # float16 has the size of two
        *_, (form, _) = forms_of(rows)
        blocks = round_up(rows.most, form.tokens) // levels.TOKENS * -(-columns // GROUP)
        buffer = self.launches.buffer
        places = buffer(blocks * levels.PLANE_BYTES * most_planes), buffer(blocks * levels.FACTOR_BYTES)
        self._levels[of] = Levels(*places, planes)
        return self._levels[of]

    def new_levels_if_wanted(self, x: p.Value) -> Levels:
        """Memory for the levels of a value that the next launch computes, or none if it is not to put any."""
        return self.new_levels(self.rounded(x)) if x in self._with_levels else NO_LEVELS

    def rounded(self, x: p.Value) -> Rounded:
        """A value whose own kernel puts its levels, as that rounds it."""
        return Rounded(x, self._with_levels[x])

    def by_rows(self, kernel: Kernel, like: p.Value, /, **arguments: Argument) -> None:
        """Launch a block for each row of `like`, with a thread for each column as far as that goes."""
        threads = min(kernel.threads, round_up(like.columns, 32))
        self.launches.add(kernel, Blocks((Tiles(like.rows),), threads), **arguments)

    def by_columns(self, kernel: Kernel, like: p.Value, /, **arguments: Argument) -> None:
        """Launch a thread for each column of each row of `like`."""
        threads = min(kernel.threads, round_up(like.columns, 32))
        self.launches.add(kernel, Blocks((-(-like.columns // threads), Tiles(like.rows)), threads), **arguments)


class ProductForm(NamedTuple):
    """A kernel for products with several tokens, and the shape of its blocks."""

    kernel: Callable[[int, int], Kernel]
    """The kernel for weights of so many bits and levels of so many planes."""
    strips: int
    tokens: int
    warps: int
    """Most warps; they share the groups if there may be fewer."""
    shares: bool


def _of_halves(bits: int, planes: int) -> Kernel:  # noqa: ARG001 - float16 is the same for both
    return halves.matmul_half(bits)


_MANY = ProductForm(_of_halves, halves.STRIPS, halves.TOKENS_OF_BLOCK, halves.THREADS // 32, False)


def forms_of(rows: p.Count) -> Iterator[tuple[ProductForm, Between]]:
    """The forms of `matmul` for up to so many rows, and the numbers of rows that each serves. `matvec` serves one."""
    first = 2
    for shape in matmul.SHAPES:
        last = min(shape.tokens, rows.most)
        yield (
            ProductForm(partial(matmul.matmul, shape), shape.strips, shape.tokens, shape.warps, True),
            Between(rows, first, last),
        )
        if last == rows.most:
            return
        first = last + 1
    yield _MANY, Between(rows, first, rows.most)
