"""A program as launches with memory of its own: it runs with any numbers of rows, from the second run as a CUDA graph.

Launches have fixed addresses. So what a run brings is copied to fixed places first (`BroughtInputs`).
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import DeviceError
from rwkv_cli.kernels.cache import tell
from rwkv_cli.kernels.contract import Watch
from rwkv_cli.kernels.cuda.array import DeviceArray
from rwkv_cli.kernels.cuda.device.compile import SIMULATED, Kernel, kinds_of
from rwkv_cli.kernels.cuda.driver import Block, Graph, HostMemory, download, move, stream, upload
from rwkv_cli.kernels.cuda.launches import (
    AddressOf,
    Argument,
    Launch,
    Launches,
    Place,
    Table,
    Tiles,
    operands,
    round_up,
)
from rwkv_cli.kernels.memory import NUMPY_DTYPES, Buffer, plan
from rwkv_cli.kernels.program import Array, Count, Input, InputMatrix, Value

_ALIGN = 256
"""Bytes. Every buffer begins at a multiple of it."""
_TRIES = 3
"""Attempts to capture a graph."""
_LENGTHS = 8
"""Numbers of rows whose launches and graph are kept, the last used ones."""


class BroughtInputs:
    """Fixed places on the device for the inputs of a run.

    Kernels find a state through its address, and so it stays where it is. Small arrays, and these addresses, are copied
    in one go. Each matrix is copied by itself.
    """

    def __init__(self, inputs: Sequence[Input | InputMatrix], launches: Sequence[Launch]) -> None:
        """Only the inputs that launches read have a place."""
        arguments = [argument for launch in launches for argument in operands(launch.arguments.values())]
        self._by_address = {argument.array for argument in arguments if isinstance(argument, AddressOf)}
        read = self._by_address | {argument.base for argument in arguments if isinstance(argument, Place)}
        self._places: dict[Input | InputMatrix, int] = {}
        at = staged = 0
        for each in sorted(inputs, key=lambda each: isinstance(each, InputMatrix)):
            if each not in read:
                continue
            self._places[each] = at
            at += round_up(8 if each in self._by_address else _most_bytes(each), 16)
            staged = staged if isinstance(each, InputMatrix) else at
        self._block, self._staged = Block(at), np.zeros(staged, np.uint8)

    def address(self, of: Input | InputMatrix) -> int:
        """The address of an input's place, or of the place of its address."""
        return self._block.address + self._places[of]

    def bring(self, arrays: Mapping[str, Array]) -> None:
        """Copy the inputs of a run to their places."""
        for each, at in self._places.items():
            array = arrays[each.name]
            if isinstance(each, InputMatrix):
                _copy(self._block.address + at, array)
            elif each in self._by_address:
                self._stage(at, np.array([array.address], np.int64))
            else:
                self._stage(at, np.ascontiguousarray(array, NUMPY_DTYPES[each.dtype]), _most_bytes(each))
        upload(self._block.address, self._staged)

    def _stage(self, at: int, values: NDArray[Any], most: int = 8) -> None:
        """Put values where the next upload takes them from. Raises ValueError for more than `most` bytes."""
        if values.nbytes > most:
            raise ValueError(f"an input has {values.nbytes} bytes, and there is room for {most}")
        self._staged[at : at + values.nbytes] = values.reshape(-1).view(np.uint8)


class CudaProgram:
    """A program, compiled for the GPU (`contract.Executable`)."""

    def __init__(
        self, launches: Launches, inputs: Sequence[Input | InputMatrix], outputs: Mapping[Value, Place]
    ) -> None:
        self._launches = launches.all  # they keep the weights alive
        self._outputs = outputs
        self._offsets, size = plan(launches.buffers, _ALIGN)
        self._workspace = Block(size)
        self._inputs = BroughtInputs(inputs, launches.all)
        self._sized = {count: each.name for each in inputs for count in each.shape if isinstance(count, Count)}
        self._tables, self._table_block = self._upload_tables()
        self._resolved = [self._resolve(launch) for launch in launches.all]
        self._bound: OrderedDict[tuple[int, ...], BoundLaunches] = OrderedDict()
        self._rows: dict[Count, int] = {}
        self._host = HostMemory()

    @property
    def is_graph(self) -> bool:
        """True if the last run was a graph."""
        return next(reversed(self._bound.values())).graph is not None

    def run(self, arrays: Mapping[str, Array], watch: Watch | None = None) -> None:  # noqa: ARG002 - a run is short
        self._rows = {count: len(arrays[name]) for count, name in self._sized.items()}
        lengths = tuple(self._rows.values())
        bound = self._bound.pop(lengths, None) or BoundLaunches(self._resolved, self._rows)
        self._bound[lengths] = bound
        while len(self._bound) > _LENGTHS:
            self._bound.popitem(last=False)
        self._inputs.bring(arrays)
        bound.run()

    def read(self, value: Value) -> NDArray[Any]:
        shape, dtype = (self._rows[value.rows], value.columns), NUMPY_DTYPES[value.dtype]
        values = self._host.array(shape, dtype)
        download(values, self._address(self._outputs[value]))
        return values

    def _address(self, of: Argument) -> int:
        """The address that a kernel gets. It is 0 for None."""
        match of:
            case None:
                return 0
            case Place(Buffer() as buffer, offset):
                return self._workspace.address + self._offsets[buffer] + offset
            case Place(Input() | InputMatrix() as brought, offset):
                return self._inputs.address(brought) + offset
            case AddressOf(brought):
                return self._inputs.address(brought)
            case Table():
                return self._table_block.address + self._tables[of]
            case Block() | DeviceArray():
                return of.address
        raise TypeError(f"{type(of).__name__} has no address")

    def _upload_tables(self) -> tuple[dict[Table, int], Block]:
        """The offset of each table in a block that has them all."""
        offsets: dict[Table, int] = {}
        numbers: list[int] = []
        for launch in self._launches:
            for table in launch.arguments.values():
                if isinstance(table, Table) and table not in offsets:
                    offsets[table] = 8 * len(numbers)
                    for row in table.rows:
                        numbers += self._pack(row, kinds_of(table.row))
        values = np.array(numbers, np.int64)
        block = Block(values.nbytes)
        upload(block.address, values)
        return offsets, block

    def _pack(self, row: Any, kinds: Mapping[str, str]) -> list[int]:
        """A row of a table as int64. A float32 is its bits."""
        numbers = [self._number(kind, value) for kind, value in zip(kinds.values(), row, strict=True)]
        return [int(n.view(np.int32)) if isinstance(n, np.float32) else n for n in numbers]

    def _number(self, kind: str, argument: Any) -> Any:
        """An argument as a kernel gets it. A Count stays one until there is a run."""
        if kind == "float":
            return np.float32(argument)
        if kind == "int":
            return argument if isinstance(argument, Count) else int(argument)
        return self._address(argument)

    def _resolve(self, launch: Launch) -> "ResolvedLaunch":
        arguments = tuple(self._number(kind, launch.arguments[name]) for name, kind in launch.kernel.kinds.items())
        return ResolvedLaunch(launch, arguments)


class ResolvedLaunch(NamedTuple):
    """A launch with its arguments as numbers, in the kernel's order. Numbers of rows are still a Count."""

    launch: Launch
    arguments: tuple[Any, ...]


class Call(NamedTuple):
    """A launch as numba gets it."""

    kernel: Kernel
    grid: tuple[int, ...]
    threads: int | tuple[int, int]
    arguments: tuple[Any, ...]


class BoundLaunches:
    """The launches of a run with certain numbers of rows. The second run captures them as a graph."""

    def __init__(self, resolved: Sequence[ResolvedLaunch], rows: Mapping[Count, int]) -> None:
        assert all(n <= count.most for count, n in rows.items()), "more rows than there is memory for"
        self.graph: Graph | None = None
        self._tries = 0
        self._loaded = False
        self._calls: list[Call] = []
        for launch, arguments in resolved:
            blocks, only = launch.blocks, launch.blocks.only
            grid = tuple(-(-rows[n.rows] // n.size) if isinstance(n, Tiles) else n for n in blocks.grid)
            if 0 in grid or (only is not None and not only.first <= rows[only.rows] <= only.last):
                continue
            numbers = tuple(rows[n] if isinstance(n, Count) else n for n in arguments)
            self._calls.append(Call(launch.kernel, grid, blocks.threads, numbers))

    def run(self) -> None:
        """Begin the launches, in order."""
        # The first run compiles and loads kernels, which a capture must not.
        if self.graph is None and self._loaded and self._tries < _TRIES and not SIMULATED:
            self._tries += 1
            try:
                self.graph = Graph(self._launch)
            except DeviceError as error:
                if self._tries == _TRIES:
                    tell(f"A token takes longer than it could: {error}.")
        if self.graph is not None:
            self.graph()
        else:
            self._launch(stream())
            self._loaded = True

    def _launch(self, on: Any) -> None:
        for kernel, grid, threads, arguments in self._calls:
            kernel.dispatcher[grid, threads, on](*arguments)


def _most_bytes(of: Input | InputMatrix) -> int:
    """The size of an input at its most rows."""
    shape = (n.most if isinstance(n, Count) else n for n in of.shape)
    return prod(shape) * NUMPY_DTYPES[of.dtype].itemsize


def _copy(address: int, array: Array) -> None:
    """Copy a float32 matrix of the host's or the device's own."""
    if isinstance(array, DeviceArray):
        move(address, array.address, array.nbytes)
    else:
        upload(address, np.ascontiguousarray(array, np.float32))
