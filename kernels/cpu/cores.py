"""The cores that this process may use, and the memory of the machine."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_CGROUPS = Path("/sys/fs/cgroup")


class Cores(NamedTuple):
    logical: int
    physical: int
    """Two threads that share a core wait for the same memory and the same multipliers."""


def memory_bytes() -> int:
    """The machine's memory, or 8 GB where the system does not say it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 << 30


def usable_cores() -> Cores:
    """The cores that affinity and the control group's quota leave to this process."""
    try:
        mine = sorted(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return Cores(os.cpu_count() or 1, os.cpu_count() or 1)
    siblings = set()
    for cpu in mine:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            siblings.add(str(cpu))
    most = min(len(mine), _quota())
    return Cores(most, min(most, len(siblings)))


def _quota() -> int:
    """The CPUs that the control groups of this process grant, rounded up."""
    limits = [limit for folder in _groups() if (limit := _limit(folder)) is not None]
    return math.ceil(min(limits, default=1 << 30))


def _groups() -> Iterator[Path]:
    """The folders of the control groups that this process is in, of version 1 or 2, and of those around them."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # version 1 has a tree for each set of controllers, version 2 one for all
        for root in (_CGROUPS / controllers, _CGROUPS / "cpu") if controllers else (_CGROUPS,):
            own = root / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def _limit(folder: Path) -> float | None:
    """The CPUs that one control group grants; None where it sets no limit."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if int(quota) > 0:
                return int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # not there, or "max"
            continue
    return None
