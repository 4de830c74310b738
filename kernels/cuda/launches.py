"""Launches of kernels, as a program is lowered to them: each with its grid and with arguments by name.

Nothing here needs to know how many rows a run has. Grids and arguments may hold a `Count`, which each run fills in.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rwkv_cli.kernels.cuda.array import DeviceArray
from rwkv_cli.kernels.cuda.device.compile import Kernel, kinds_of
from rwkv_cli.kernels.cuda.driver import Block
from rwkv_cli.kernels.memory import Buffer
from rwkv_cli.kernels.program import Count, Input, InputMatrix


class Place(NamedTuple):
    """An address: `offset` bytes after the beginning of a buffer that is yet to be planned, or of an input."""

    base: Buffer | Input | InputMatrix
    offset: int = 0


class AddressOf(NamedTuple):
    """The place where a run puts the address of an array that it brings."""

    array: Input


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of one kind, such as `ProductRow`, that a kernel reads. Their fields have kinds as arguments have."""

    rows: tuple[Any, ...]

    @property
    def row(self) -> Any:
        """The type of its rows."""
        first, *_ = self.rows
        return type(first)


class Tiles(NamedTuple):
    """As many blocks as there are tiles of `size` rows."""

    rows: Count
    size: int = 1


class Between(NamedTuple):
    """Runs with `first` to `last` rows, both included."""

    rows: Count
    first: int
    last: int


class Blocks(NamedTuple):
    """The shape of a launch: how many blocks there are, how many threads each has, and in which runs."""

    grid: tuple[int | Tiles, ...]
    threads: int | tuple[int, int]
    only: Between | None = None
    """None for all runs. A grid that a run leaves empty is not launched either."""


Argument = Place | AddressOf | Table | Block | DeviceArray | Count | int | float | None

_GIVEN: dict[str, tuple[type, ...]] = {
    "address": (Place, Table, Block, DeviceArray, type(None)),
    "slot": (AddressOf,),
    "int": (int, Count),
    "float": (float,),
}
"""Types that may be given for each kind of argument."""


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch."""

    kernel: Kernel
    blocks: Blocks
    arguments: Mapping[str, Argument]


class Launches:
    """A list of launches in the making, and the buffers that they use."""

    def __init__(self) -> None:
        self.all: list[Launch] = []
        self.buffers: list[Buffer] = []

    def buffer(self, size: int) -> Place:
        """Memory for `size` bytes. Where it lies is planned when the list is complete."""
        self.buffers.append(Buffer(size))
        return Place(self.buffers[-1])

    def add(self, kernel: Kernel, blocks: Blocks, /, **arguments: Argument) -> None:
        """Append a launch. Raises TypeError for arguments that are not the kernel's."""
        _check(kernel.name, kernel.kinds, arguments)
        self.all.append(Launch(kernel, blocks, arguments))
        for argument in operands(arguments.values()):
            if isinstance(argument, Place):
                self._use(argument)

    def keep(self, place: Place) -> None:
        """Leave what is computed there untouched until the end, so that it can be read after a run."""
        self._use(place)

    def _use(self, place: Place) -> None:
        if isinstance(place.base, Buffer):
            place.base.used_at(len(self.all))


def round_up(size: int, unit: int) -> int:
    """Return the least multiple of `unit` that is not less than `size`."""
    return -(-size // unit) * unit


def operands(arguments: Any) -> Iterator[Argument]:
    """The arguments, and what rows of tables among them hold."""
    for argument in arguments:
        if isinstance(argument, Table):
            for row in argument.rows:
                yield from row
        yield argument


def _check(name: str, kinds: Mapping[str, str], given: Mapping[str, Argument]) -> None:
    if given.keys() != kinds.keys():
        raise TypeError(f"{name} takes {', '.join(kinds)}, not {', '.join(given)}")
    for each, kind in kinds.items():
        argument = given[each]
        if not isinstance(argument, _GIVEN[kind]):
            raise TypeError(f"{name}: {each} must be given as {kind}, not as {type(argument).__name__}")
        if isinstance(argument, Table):
            for row in argument.rows:
                _check(argument.row.__name__, kinds_of(argument.row), row._asdict())
