"""What instructions do beside computing: with memory, with a warp's other threads, and with what is under way."""

from typing import Any

import numpy as np

from ptx import warps
from ptx.errors import UnknownInstructionError
from ptx.launch import SHARED_BASE


def fit(values: Any, dtype: Any) -> Any:
    """Bits as another type of their size, or a number as one of another."""
    return values.view(dtype) if values.dtype.itemsize == np.dtype(dtype).itemsize else values.astype(dtype)


def _at(base: Any, offset: int, lanes: Any) -> Any:
    return base[lanes].astype(np.int64) + offset


def load(frame: Any, active: Any, ref: Any, base: Any, offset: int) -> list[Any]:
    """An array for each number that a thread reads."""
    values = frame.memory.load(ref, active.lanes, _at(base, offset, active.lanes))
    return _spread(frame, active, values)


def _spread(frame: Any, active: Any, values: Any) -> list[Any]:
    """The columns of values that active threads have, with something for the others."""
    n = len(frame.alive)
    if len(values) == n:
        return list(np.ascontiguousarray(values.T))
    out = np.zeros((values.shape[1], n), values.dtype)
    out[:, active.lanes] = values.T
    return list(out)


def store(frame: Any, active: Any, ref: Any, base: Any, offset: int, values: list[Any]) -> None:
    lanes = active.lanes
    columns = np.stack([fit(each[lanes], ref.dtype) for each in values], 1)
    frame.memory.store(ref, lanes, _at(base, offset, lanes), columns)


def copy(frame: Any, active: Any, ref: Any, target: Any, offset: int, source: Any, beyond: int) -> None:
    """Begin to copy to shared memory."""
    lanes = active.lanes
    frame.memory.begin_copy(ref, lanes, _at(target, offset, lanes), _at(source, beyond, lanes))


def commit_group(frame: Any, active: Any, _: None) -> None:
    frame.memory.group[active.lanes] += 1


def wait_group(frame: Any, active: Any, newest: int) -> None:
    frame.memory.wait_copies(active.lanes, newest)


def wait_all(frame: Any, active: Any, _: None) -> None:
    frame.memory.wait_copies(active.lanes, None)


def _check_members(active: Any, members: Any) -> None:
    if (members[active.lanes] != -1).any():
        raise UnknownInstructionError("an exchange among some of a warp's threads")


def shuffle(frame: Any, active: Any, mode: str, x: Any, operand: Any, clamp: Any, members: Any) -> list[Any]:
    """The other threads' values, and whether there was one."""
    _check_members(active, members)
    if (clamp[active.lanes] != (0 if mode == "up" else warps.LANES - 1)).any():
        raise UnknownInstructionError(f"shfl.sync.{mode} among parts of a warp")
    other = warps.shuffle_source(mode, frame.lane, operand)
    from_ = np.arange(len(x)) - frame.lane + other
    missing = active.mask & ~frame.exists[from_]
    if missing.any():
        lanes, what = np.flatnonzero(missing), "a read of a thread that does not exist"
        raise frame.memory.fault("synccheck", f"`shfl.sync.{mode}`", lanes, what)
    return [x[from_], other != frame.lane]


def redux(_: Any, active: Any, opcode: str, x: Any, members: Any) -> Any:
    _check_members(active, members)
    return warps.reduced(opcode, x)


def matrices(frame: Any, active: Any, ref: Any, base: Any, offset: int, count: int) -> list[Any]:
    """The registers of some matrices, whose rows lie at the addresses that eight lanes have for each."""
    lanes = active.lanes[frame.lane[active.lanes] < 8 * count]
    rows = np.zeros((len(frame.alive), 16), np.uint8)
    rows[lanes] = frame.memory.load(ref, lanes, _at(base, offset, lanes))
    return warps.matrices(rows, count)


def warp(frame: Any, active: Any, members: Any) -> None:
    """A barrier of a warp."""
    _check_members(active, members)
    frame.memory.of_warp[active.lanes] += 1


def wait(frame: Any, active: Any, _: None) -> None:
    """Wait for the launches before."""
    frame.memory.waited[active.lanes] = True


def launch_dependents(frame: Any, active: Any, _: None) -> None:
    """Let the next launch begin, which changes nothing here."""


def cvta_shared(x: Any) -> Any:
    return x + SHARED_BASE


def cvta_to_shared(x: Any) -> Any:
    return x - SHARED_BASE


def cvta_global(x: Any) -> Any:
    return x


cvta_to_global = cvta_global


def apart(x: Any, count: int) -> list[Any]:
    """The parts of each register, the lower first."""
    parts = x.view(np.dtype(f"i{x.dtype.itemsize // count}")).reshape(-1, count)
    return [np.ascontiguousarray(parts[:, i]) for i in range(count)]


def joined(*parts: Any) -> Any:
    """One register of several."""
    return np.stack(parts, 1).view(np.dtype(f"i{parts[0].dtype.itemsize * len(parts)}"))[:, 0].copy()
