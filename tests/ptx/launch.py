"""The memory of a launch as its threads see it: every access is checked before it is done."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ptx.arithmetic import DTYPES
from ptx.errors import KernelError, UnknownInstructionError
from ptx.parse import Code, Instruction
from ptx.races import THREADS, Access, GlobalRaces, SharedRaces
from ptx.spaces import UNWRITTEN, GlobalMemory, Space, round_up

SHARED_BASE = 1 << 60
"""Where shared memory lies among generic addresses."""


class Run(NamedTuple):
    """A row of launches that overlap: blocks of one begin before those of the ones before are done."""

    memory: GlobalMemory
    early: list[tuple["Launch", Access]]
    """What a launch read before its wait for the one before."""
    writes: list[tuple["Launch", Access]]

    def end(self) -> None:
        """Check that nothing which a launch writes was read by another that had not yet waited."""
        written = [access.grains(1).ravel() for _, access in self.writes]
        for launch, access in self.early:
            others = [grains for (by, _), grains in zip(self.writes, written, strict=True) if by is not launch]
            bad = np.isin(access.grains(1), np.concatenate([np.empty(0, np.int64), *others])).any(1)
            if bad.any():
                place = self.memory.place(int(access.at[bad][0]) + self.memory.base)
                what = f"{access.instruction}: a read before the wait of what another launch writes"
                raise KernelError(f"griddepcontrol: {launch.name}: {what}, at {place}")


class Reference(NamedTuple):
    """What an instruction says of the memory that it takes part in."""

    instruction: Instruction
    space: str
    dtype: Any
    count: int
    """Numbers of a thread."""

    def touches(self, space: str) -> bool:
        """True if it may access a space. A copy is from one to the other."""
        return self.space in (space, "") or self.instruction.parts[0] == "cp"

    @property
    def grain(self) -> int:
        """The bytes of each number, or the largest ones that bytes are moved as."""
        return min(self.size, 8) if self.dtype is np.uint8 else self.size // self.count

    @property
    def size(self) -> int:
        return self.count * int(np.dtype(self.dtype).itemsize)


def reference(instruction: Instruction) -> Reference:
    """What an ld, a st, a cp.async or an ldmatrix says."""
    name, *more = instruction.parts
    space = next((each for each in more if each in ("global", "shared", "param", "local", "const")), "")
    if name == "cp":
        return Reference(instruction, "shared", np.uint8, int(str(instruction.operands[2])))
    if name == "ldmatrix":
        if instruction.opcode.split(".")[1:4] != ["sync", "aligned", "m8n8"] or "trans" in more:
            raise UnknownInstructionError(str(instruction))
        return Reference(instruction, "shared", np.uint8, 16)
    count = next((int(each[1:]) for each in more if each in ("v2", "v4", "v8")), 1)
    if space in ("local", "const") or more[-1] not in DTYPES:
        raise UnknownInstructionError(str(instruction))
    return Reference(instruction, space, DTYPES[more[-1]], count)


class Copies(NamedTuple):
    """Copies that are under way: of some threads, from global to shared memory, in each one's group."""

    reference: Reference
    lanes: Any
    source: Any
    target: Any
    values: Any
    group: Any

    def of(self, chosen: Any) -> "Copies":
        return Copies(self.reference, *(each[chosen] for each in self[1:]))


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel."""

    name: str
    code: Code
    memory: GlobalMemory
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    arguments: Sequence[Any]
    run: Run | None = None
    """What it may overlap with."""
    excused: Callable[[Any], Any] = lambda address: np.zeros(len(address), bool)
    """True for addresses where it may read what nobody has written."""


class Lanes(NamedTuple):
    """Where each of the threads belongs that are executed at a time."""

    block: Any
    """Its block, as these count."""
    of_grid: Any
    """Its block, as the grid counts."""
    thread: Any
    """Its number in the block, from 1."""


class Memory:
    """Memory as the threads of some blocks have it."""

    def __init__(self, launch: Launch, lanes: Lanes, log: GlobalRaces, grain: int) -> None:
        """`grain` is the size of the smallest number in shared memory."""
        self.launch, self.memory, self.log, self.lanes = launch, launch.memory, log, lanes
        arrays, blocks = launch.code.shared.values(), int(lanes.block[-1]) + 1
        self.size = round_up(max([start + size for start, size in arrays], default=0), 16) + 16
        self.shared = Space(blocks * self.size)
        for start, size in arrays:
            self.shared.state.reshape(blocks, -1)[:, start : start + size] = UNWRITTEN
        self.races = SharedRaces(blocks, self.size, grain)
        self.epoch, self.of_warp, self.group = (np.zeros(len(lanes.block), np.int32) for _ in range(3))
        self.waited = np.zeros(len(lanes.block), bool)
        self.copies: list[Copies] = []

    def fault(self, check: str, instruction: Instruction | str, lanes: Any, what: str) -> KernelError:
        """A report, with the first of the lanes that it is about."""
        who = ", ".join(map(self._who, lanes[:4])) + ", …" * (len(lanes) > 4)
        return KernelError(f"{check}: {self.launch.name}: {instruction}: {what}, by {who}")

    def _who(self, lane: Any) -> str:
        return f"thread {self.lanes.thread[lane] - 1} of block {self.lanes.of_grid[lane]}"

    def load(self, ref: Reference, lanes: Any, address: Any) -> Any:
        """What these lanes read, a row each."""
        values = np.empty((len(lanes), ref.count), ref.dtype)
        for of_space, here in self._by_space(ref, address, self._load_global, self._load_shared):
            values[here] = of_space(ref, lanes[here], address[here])
        return values

    def store(self, ref: Reference, lanes: Any, address: Any, values: Any) -> None:
        """Write a row of each of these lanes."""
        for of_space, here in self._by_space(ref, address, self._store_global, self._store_shared):
            of_space(ref, lanes[here], address[here], values[here])

    @staticmethod
    def _by_space(ref: Reference, address: Any, of_grid: Any, of_block: Any) -> Iterator[tuple[Any, Any]]:
        """What is to be called for which accesses. Addresses without a space are in either."""
        if ref.space:
            yield of_block if ref.space == "shared" else of_grid, slice(None)
            return
        in_shared = address >= SHARED_BASE
        for function, here in ((of_block, in_shared), (of_grid, ~in_shared)):
            if here.any():
                yield function, here

    # global memory

    def _load_global(self, ref: Reference, lanes: Any, address: Any) -> Any:
        access = self._access(ref, lanes, address, writes=False)
        if self.launch.run is not None and not (waited := self.waited[lanes]).all():
            self.launch.run.early.append((self.launch, access._replace(at=access.at[~waited])))
        return self.memory.load(access.at, ref.dtype, ref.count)

    def _store_global(self, ref: Reference, lanes: Any, address: Any, values: Any) -> None:
        access = self._access(ref, lanes, address, writes=True)
        if self.launch.run is not None:
            self.launch.run.writes.append((self.launch, access))
            if not (waited := self.waited[lanes]).all():
                raise self.fault("griddepcontrol", ref.instruction, lanes[~waited], "a write before the wait")
        self.memory.store(access.at, values)

    def _access(self, ref: Reference, lanes: Any, address: Any, writes: bool) -> Access:
        """Note accesses to global memory, which must be allowed."""
        at = address - self.memory.base
        refused = self.memory.refused(at, ref.size, writes)
        if refused is not None:
            self._refuse(ref.instruction, lanes, address, refused, self.memory.place)
        thread = self.lanes.of_grid[lanes] * THREADS + self.lanes.thread[lanes] - 1
        self.log.accesses.append(Access(ref.instruction, at, ref.size, thread, self.epoch[lanes], writes))
        return self.log.accesses[-1]

    def _refuse(self, instruction: Instruction, lanes: Any, address: Any, refused: Any, place: Any) -> None:
        """Raise the fault of accesses that are refused, unless all of them are excused."""
        if (refused == 1).any():
            lanes, address = lanes[refused == 1], address[refused == 1]
            what = "an access to what is not there, or not at a multiple of its size"
            raise self.fault("memcheck", instruction, lanes, f"{what}, at {place(int(address[0]))}")
        bad = (refused == 2) & ~self.launch.excused(address)
        if bad.any():
            what = f"a read of what nobody has written, at {place(int(address[bad][0]))}"
            raise self.fault("initcheck", instruction, lanes[bad], what)

    # shared memory

    def _within(self, ref: Reference, lanes: Any, address: Any, writes: bool) -> Any:
        """Offsets among the blocks' shared memory, and the grains there."""
        address = np.where(address >= SHARED_BASE, address - SHARED_BASE, address)
        outside = (address < 0) | (address + ref.size > self.size)
        at = np.where(outside, 0, address) + self.lanes.block[lanes] * self.size
        grains = self.races.grains(at, ref.size)
        under_way = self.races.copier[grains].any(1)
        if under_way.any():
            raise self.fault("cp.async", ref.instruction, lanes[under_way], "an access to what is under way")
        refused = self.shared.refused(at, ref.size, writes)
        if refused is not None:
            self._refuse(ref.instruction, lanes, address, refused, lambda at: f"shared address {at}")
        return at, grains

    def _load_shared(self, ref: Reference, lanes: Any, address: Any) -> Any:
        at, grains = self._within(ref, lanes, address, writes=False)
        self._race(ref, lanes, address, self.races.read(grains, self.lanes.thread[lanes], self.of_warp[lanes]))
        return self.shared.load(at, ref.dtype, ref.count)

    def _store_shared(self, ref: Reference, lanes: Any, address: Any, values: Any) -> None:
        at, grains = self._within(ref, lanes, address, writes=True)
        self._race(ref, lanes, address, self.races.write(grains, self.lanes.thread[lanes], self.of_warp[lanes]))
        self.shared.store(at, values)

    def _race(self, ref: Reference, lanes: Any, address: Any, other: Any) -> None:
        bad = (other != 0).any(1)
        if bad.any():
            code = int(other[bad].ravel()[np.argmax(other[bad].ravel() != 0)])
            who = f"thread {code - 1}" if code > 0 else "several threads"
            what = f"no barrier since an access by {who} of the block, at shared address {int(address[bad][0])}"
            raise self.fault("racecheck", ref.instruction, lanes[bad], what)

    # barriers and waiting

    def meet(self, lanes: Any, blocks: Any) -> None:
        """All threads of these blocks have met at a barrier."""
        self.epoch[lanes] += 1
        self.races.forget(blocks)

    # copies that are under way

    def begin_copy(self, ref: Reference, lanes: Any, target: Any, source: Any) -> None:
        at, grains = self._within(ref, lanes, target, writes=True)
        self._race(ref, lanes, target, self.races.write(grains, self.lanes.thread[lanes], self.of_warp[lanes]))
        values = self._load_global(ref, lanes, source)
        self.races.copier[grains] = self.lanes.thread[lanes][:, None]
        self.copies.append(Copies(ref, lanes, source, at, values, self.group[lanes]))

    def wait_copies(self, lanes: Any, newest: int | None) -> None:
        """Complete these threads' copies, but for their `newest` groups; with None those in no group, too."""
        waiting = np.zeros(len(self.lanes.block), bool)
        waiting[lanes] = True
        under_way, self.copies = self.copies, []
        for each in under_way:
            done = waiting[each.lanes]
            if newest is not None:
                done &= each.group < self.group[each.lanes] - newest
            self.copies += [each.of(~done)] * bool((~done).any())
            self._complete(each.of(done))

    def _complete(self, copies: Copies) -> None:
        ref, lanes, source, target, values, _ = copies
        changed = (self.memory.load(source - self.memory.base, np.uint8, ref.count) != values).any(1)
        if changed.any():
            raise self.fault("cp.async", ref.instruction, lanes[changed], "its source was changed meanwhile")
        grains = self.races.grains(target, ref.size)
        self.races.copier[grains] = 0
        self.races.write(grains, self.lanes.thread[lanes], self.of_warp[lanes])
        self.shared.store(target, values)

    def end(self) -> None:
        """Check what is left to check when all threads have ended."""
        for each in self.copies:
            raise self.fault("cp.async", each.reference.instruction, each.lanes, "nobody waited for it")
