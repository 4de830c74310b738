"""The cores that this process may use."""

import math
import os
from pathlib import Path
from typing import NamedTuple


class Cores(NamedTuple):
    logical: int
    physical: int
    """Two threads that share a core wait for the same memory and the same multipliers."""


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
    """CPUs that the control group (v2) grants, rounded up."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.ceil(int(limit) / int(period))
    except (OSError, ValueError):  # none, or "max"
        return 1 << 30
