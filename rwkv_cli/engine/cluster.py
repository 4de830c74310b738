"""A crew of workers on a Ray cluster: one process each, with the model loaded once.

Ray is imported when a cluster is used. What becomes of results and of lost work is decided in `engine/spread.py`.
"""

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic

from rwkv_cli.engine.errands import Do, Item, Result, Work
from rwkv_cli.engine.handed import Handed
from rwkv_cli.engine.spread import Ended, Failure
from rwkv_cli.errors import RwkvError, WorkerError, reason
from rwkv_cli.kernels.cache import cache_folder
from rwkv_cli.kernels.cpu.cores import usable_cores

LOCAL = "local"
"""The address of a cluster on this machine, which begins and ends with the command."""

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray would report home
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # Ray would print the ends of workers to standard output
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray would warn of what a later version does
}
"""Variables that have to be set before Ray is imported."""

_STARTS = 3
"""Workers lost in a row while they begin, before the cluster is taken for unfit."""

_LOOK = 1.0
"""Seconds between looks for new machines."""

_STORE = 128 << 20
"""Bytes of the object store of a local cluster, whose workers read files where they lie."""

Brought = Mapping[Handed, Sequence[Any]]
"""References to the pieces of files in the object store."""


@dataclass(frozen=True)
class Place:
    """The machines and processes that work."""

    address: str
    """`LOCAL`, "auto" for a cluster that runs on this machine, or HOST:PORT of a cluster's head."""
    workers: int | None
    """None for one on each machine, also on those that join later."""
    threads: int | None
    """Threads of a worker, None for its share of the cores."""
    device: str


@dataclass(frozen=True)
class _Missing:
    """A worker's answer in place of a result: files that its machine does not have."""

    files: list[Handed]


class _Worker(Generic[Item, Result]):
    """The process that works. Ray makes it, and calls its methods one after another."""

    def __init__(self, work: Work[Item, Result], place: Place, cores: int, program: str) -> None:
        self._work, self._place, self._cores, self._program = work, place, cores, program
        self._do: Do[Item, Result] | None = None

    def start(self, brought: Brought) -> _Missing | Failure | None:
        """Load what all items need. Returns None when the worker is ready."""
        if (here := program()) != self._program:
            return Failure(
                f"the worker on {socket.gethostname()} has {here} and this machine has {self._program}; "
                "install the same rwkv-cli, numba and llvmlite on both"
            )
        try:
            with _places(self._work.files, brought) as places:
                if isinstance(places, _Missing):
                    return places
                threads = self._place.threads or min(self._cores, usable_cores().physical)
                self._do = self._work.open(places, self._place.device, threads)
                return None
        except (RwkvError, OSError, MemoryError) as error:
            return Failure(f"the worker on {socket.gethostname()}: {_words(error)}")

    def run(self, items: Sequence[Item], brought: Brought) -> _Missing | list[Result | Failure]:
        """Work on items."""
        needed = {file for item in items for file in self._work.files_of(item)}
        try:
            with _places(needed, brought) as places:
                if isinstance(places, _Missing):
                    return places
                assert self._do is not None, "not started"
                return [*self._do(items, places)]
        except Exception as error:  # it must reach the user, with the name of the item
            if len(items) == 1:
                return [Failure(_words(error))]
        return [result for item in items for result in self.run([item], brought)]  # type: ignore[union-attr]


def _words(error: Exception) -> str:
    """Say what went wrong. A bug is called by its type, too."""
    if isinstance(error, OSError):
        return reason(error)
    return str(error) if isinstance(error, RwkvError) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _places(files: "Sequence[Handed] | set[Handed]", brought: Brought) -> Iterator[dict[Handed, Path] | _Missing]:
    """Say where files are on this machine. Those that were brought lie in a folder that vanishes after the block."""
    seen = {file: file.path for file in files if file not in brought and file.here()}
    missing = [file for file in files if file not in brought and file not in seen]
    if missing:
        yield _Missing(missing)
        return
    if all(file in seen for file in files):
        yield seen
        return
    import ray

    with tempfile.TemporaryDirectory(prefix="rwkv-", ignore_cleanup_errors=True) as folder:
        for number, file in enumerate(file for file in files if file in brought):
            seen[file] = Path(folder) / f"{number}{file.path.suffix}"
            file.write(map(ray.get, brought[file]), seen[file])
        yield seen


def program() -> str:
    """The program that decides about the bits of results: the version, and the kernels with their compilers."""
    return f"rwkv-cli {version('rwkv-cli')} ({cache_folder().name})"


@dataclass(eq=False)
class _Member:
    """A worker as the driver knows it."""

    actor: Any
    node: str | None
    """The machine that it was made for, None for any."""


@dataclass
class _Call(Generic[Item]):
    """A call that a worker has not answered."""

    member: _Member
    part: range | None = None
    """The numbers of its items, None while it starts."""
    items: Sequence[Item] = ()
    brought: dict[Handed, Sequence[Any]] = field(default_factory=dict)


class Cluster(Generic[Item, Result]):
    """A crew on a Ray cluster (see `spread.Crew`). A worker that is lost gets a successor."""

    def __init__(self, place: Place, work: Work[Item, Result], cores: int) -> None:
        """Use the cluster that `connected` leads to, on which there are `cores` for us now."""
        self._place, self._work, self._cores = place, work, cores
        self._members: list[_Member] = []
        self._free: list[_Member] = []
        self._calls: dict[Any, _Call[Item]] = {}
        self._lent: dict[Handed, Sequence[Any]] = {}
        """The files that some worker lacked when it began, in the object store."""
        self._lost_starts = 0
        self._looked = -_LOOK

    @property
    def size(self) -> int:
        """The number of workers, those that are still getting ready included."""
        return len(self._members)

    @property
    def free(self) -> int:
        """The number of workers that are ready."""
        return len(self._free)

    def begin(self, part: range, items: Sequence[Item]) -> None:
        """Have a free worker work on items."""
        self._send(_Call(self._free.pop(), part, items))

    def ended(self) -> list[Ended[Result]]:
        """Wait a part of a second for parts to end, or for workers to come. Each part ends once.

        Raises WorkerError where workers cannot begin.
        """
        import ray

        self._hire()
        if not self._calls:
            time.sleep(0.1)
            return []
        calls = list(self._calls)
        ready, _ = ray.wait(calls, timeout=0.2)
        if ready:
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        found = [self._take(reference) for reference in ready]
        return [ended for ended in found if ended is not None]

    def _take(self, reference: Any) -> Ended[Result] | None:
        """Read a worker's answer, and do what it asks for."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        call = self._calls.pop(reference)
        try:
            answer = ray.get(reference)
        except RayTaskError:  # a bug
            raise
        except RayError as error:
            return self._lose(call, str(error))
        if isinstance(answer, _Missing):
            for file in answer.files:
                lent = self._lent if call.part is None else call.brought
                if file not in lent:
                    lent[file] = [ray.put(piece) for piece in file.pieces()]
            self._send(call)
            return None
        if call.part is None:
            if isinstance(answer, Failure):
                raise WorkerError(answer.reason)
            self._lost_starts = 0
            self._free.append(call.member)
            return None
        self._free.append(call.member)
        return Ended(call.part, answer)

    def _send(self, call: _Call[Item]) -> None:
        """Make a call, with the files that the worker is known to lack."""
        actor = call.member.actor
        if call.part is None:
            reference = actor.start.remote(self._lent)
        else:
            reference = actor.run.remote(call.items, call.brought)
        self._calls[reference] = call

    def _lose(self, call: _Call[Item], why: str) -> Ended[Result] | None:
        """Let go of a worker that no longer answers. Nothing that it may still do is looked at."""
        import ray

        self._members.remove(call.member)
        ray.kill(call.member.actor)
        if call.part is not None:
            return Ended(call.part, None)
        self._lost_starts += 1
        if "No module named" in why:
            raise WorkerError("a machine of the cluster lacks rwkv-cli; install the same version there")
        if self._lost_starts == _STARTS and not self._free and all(one.part is None for one in self._calls.values()):
            raise WorkerError(
                f"{_STARTS} workers were lost while they loaded the model; is it too large for their memory?"
            )
        return None

    def _hire(self) -> None:
        """Make the workers that there should be and are not."""
        if time.monotonic() < self._looked + _LOOK:
            return
        self._looked = time.monotonic()
        place = self._place
        if place.workers is not None:
            cores = place.threads or max(1, self._cores // place.workers)
            for _ in range(place.workers - len(self._members)):
                self._start(None, cores)
            return
        taken = {member.node for member in self._members}
        for node, cores in _nodes().items():
            if node not in taken:
                self._start(node, place.threads or cores)

    def _start(self, node: str | None, cores: int) -> None:
        """Make a worker."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        where: Any = "SPREAD" if node is None else NodeAffinitySchedulingStrategy(node, soft=False)
        made = ray.remote(_Worker).options(
            num_cpus=cores, num_gpus=int(self._place.device == "cuda"), scheduling_strategy=where
        )
        member = _Member(made.remote(self._work, self._place, cores, program()), node)
        self._members.append(member)
        self._send(_Call(member))


def _nodes() -> dict[str, int]:
    """The machines of the cluster that have cores for us, by their ids."""
    import ray

    alive = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]}
    return {node: cores for node, cores in alive.items() if cores}


@contextlib.contextmanager
def connected(place: Place, work: Work[Item, Result]) -> Iterator[Cluster[Item, Result]]:
    """Begin or join a cluster for the block. Raises WorkerError where that cannot be."""
    os.environ |= ENVIRONMENT
    try:
        import ray
    except ModuleNotFoundError:
        raise WorkerError('--ray needs Ray; install it with: pip install "rwkv-cli[ray]"') from None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": 40}
    if place.address == LOCAL:
        cores = (place.workers or 1) * (place.threads or max(1, usable_cores().physical // (place.workers or 1)))
        # Ray's ports have no password: only this machine may reach them.
        quiet |= {"_node_ip_address": "127.0.0.1", "num_cpus": cores, "object_store_memory": _STORE}
        quiet |= {"include_dashboard": False}
    elif place.address != "auto":
        _check_reachable(place.address, ray.util.get_node_ip_address())
    try:
        ray.init(address=place.address, **quiet)
    except ConnectionError as error:
        raise WorkerError(
            f"--ray {place.address}: this machine is part of no such Ray cluster ({' '.join(str(error).split())}); "
            "begin one with `ray start --head`, or join one with `ray start --address HOST:PORT`"
        ) from None
    except (RuntimeError, ValueError) as error:  # versions of Ray or Python differ
        raise WorkerError(f"--ray {place.address}: {' '.join(str(error).split())}") from None
    try:
        yield Cluster(place, work, sum(_nodes().values()))
    finally:
        ray.shutdown()


def _check_reachable(address: str, here: str) -> None:
    """Raise WorkerError where nobody listens. Ray would try for minutes.

    `here` is what Ray takes for the address of this machine, also in place of localhost.
    """
    host, _, port = address.rpartition(":")
    host = here if host in ("localhost", "127.0.0.1", "[::1]") else host.strip("[]")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise WorkerError(
            f"--ray {address}: no Ray cluster can be reached at {host} ({why}); begin one there with: "
            f"ray start --head --port {port}"
        ) from None
