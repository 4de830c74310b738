"""Work on a Ray cluster whose machines are all this one, each in a process group of its own.

    python benchmarks/cluster.py speed MODEL.safetensors [--workers 1 2 4] [--prompts 64]
    python benchmarks/cluster.py faults MODEL.safetensors [--prompts 64]
    python benchmarks/cluster.py driver [--items 100000]

speed: the prompts of a batch by so many workers with one thread each, without the time that they take to begin. faults:
a worker killed in the middle, the command killed and begun again, and a machine that joins late; the answers must be
those of one machine, byte for byte. driver: what an item costs the command with a model that does nothing, the memory
that it has as items go by, and what follows for 1,000 files on 100 machines.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_cli.engine.cluster import ENVIRONMENT, Place, connected
from rwkv_cli.engine.handed import Handed
from rwkv_cli.engine.spread import spread

os.environ |= ENVIRONMENT | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # loopback on any system

RWKV = [sys.executable, "-P", "-m", "rwkv_cli"]


@contextmanager
def machines(count: int) -> Iterator[Any]:
    """A cluster of machines with one core each, beside its head, which has none."""
    from ray.cluster_utils import Cluster

    common = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **common})
    join = cluster.add_node
    cluster.add_node = lambda: join(num_cpus=1, **common)
    try:
        for _ in range(count):
            cluster.add_node()
        yield cluster
    finally:
        cluster.shutdown()


def prompts(path: Path, count: int) -> None:
    """Write a file of prompts whose answers are of different lengths."""
    lines = [{"prompt": f"Once upon a time there were {i} foxes", "max_tokens": 40 + i % 50} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def command(model: Path, file: Path, out: Path, *more: object) -> list[str]:
    words = ["generate", "--batch", file, "-m", model, "-o", out, "--seed", 1, "--ignore-eos", *more]
    return RWKV + [str(word) for word in words]


def workers_of(cluster: Any) -> list[int]:
    """The processes of workers that are in work."""
    raylets = {info.process.pid for node in cluster.list_all_nodes() for info in node.all_processes.get("raylet", [])}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, parent = (
                (folder / "cmdline").read_bytes(),
                int((folder / "stat").read_text().rpartition(")")[2].split()[1]),
            )
        except OSError:
            continue
        if parent in raylets and name.startswith(b"ray::_Worker.run"):
            found.append(int(folder.name))
    return found


def speed(model: Path, counts: list[int], number: int) -> None:
    from rwkv_cli.engine.errands import Answering
    from rwkv_cli.engine.jobs import JobSettings, Shared, prepare, read_jobs
    from rwkv_cli.engine.model import LanguageModel
    from rwkv_cli.engine.sampling import Sampling

    with tempfile.TemporaryDirectory() as folder:
        prompts(Path(folder) / "prompts", number)
        data = (Path(folder) / "prompts").read_bytes()
    lm = LanguageModel.load(model)
    shared = Shared(lm.new_state(), Sampling(), True)
    tasks = prepare(lm, "prompts", read_jobs("prompts", data, JobSettings(max_tokens=64, seed=1, stops=())), shared)
    with machines(max(counts)) as cluster:
        for count in counts:
            place = Place(cluster.address, count, 1, "cpu")
            with connected(place, Answering(Handed.model(model), shared, 8)) as crew:
                while crew.free < count:
                    crew.ended()
                begin, tokens = time.perf_counter(), 0
                for step in spread(tasks, crew, 32, str):
                    tokens += sum(answer.tokens for answer in step.results)
                seconds = time.perf_counter() - begin
            print(f"{count} workers: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tok/s", flush=True)


def faults(model: Path, number: int) -> None:
    with tempfile.TemporaryDirectory() as name, machines(2) as cluster:
        folder = Path(name)
        prompts(folder / "prompts", number)
        subprocess.run(command(model, folder / "prompts", folder / "alone", "--batch-size", 1), check=True)
        alone = (folder / "alone").read_bytes()

        def run(what: str, disturb: Callable[[subprocess.Popen[bytes], Path], object]) -> None:
            out = folder / what.replace(" ", "-")
            spread_over = command(model, folder / "prompts", out, "--ray", cluster.address, "--batch-size", 2)
            begin = time.perf_counter()
            process = subprocess.Popen(spread_over)
            while not (out.exists() and out.read_bytes().count(b"\n") >= number // 8):
                time.sleep(0.02)
                assert process.poll() is None, "ended before it was disturbed"
            disturb(process, out)
            if process.wait():
                count = len(out.read_bytes().splitlines())
                print(f"{what}: ended by {process.returncode} with {count} answers", flush=True)
                subprocess.run(spread_over, check=True)
            same = out.read_bytes() == alone
            print(
                f"{what}: {'the same' if same else 'ANOTHER'} output, {time.perf_counter() - begin:.1f} s", flush=True
            )
            assert same

        run("nothing", lambda *_: None)
        run("a worker killed", lambda *_: os.kill(workers_of(cluster)[0], signal.SIGKILL))
        run("the command killed", lambda process, _: process.kill())
        run("Ctrl-C", lambda process, _: process.send_signal(signal.SIGINT))

        def join(process: subprocess.Popen[bytes], _: Path) -> None:
            began, at_work = time.perf_counter(), set[int]()
            cluster.add_node()
            while len(at_work) < 3 and process.poll() is None:
                at_work |= set(workers_of(cluster))
                time.sleep(0.1)
            print(f"{len(at_work)} workers have worked {time.perf_counter() - began:.1f} s later")

        run("a machine joins", join)
        run("a machine leaves", lambda *_: cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False))


@dataclass(frozen=True)
class Nothing:
    """A model that does nothing: each item comes back as an answer of 200 bytes."""

    files: tuple[Handed, ...] = ()

    def files_of(self, _item: str) -> tuple[Handed, ...]:
        return ()

    def open(self, _places: Mapping[Handed, Path], _device: str, _threads: int) -> Callable[..., list[bytes]]:
        return lambda items, _: [item.encode().ljust(200) for item in items]


def memory() -> float:
    """The memory of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def cpu() -> float:
    """Seconds of computing that this process has had, in all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def driver(number: int) -> None:
    items: Sequence[str] = [f"prompt {i}" for i in range(number)]
    with machines(2) as cluster, connected(Place(cluster.address, 2, 1, "cpu"), Nothing()) as crew:
        while crew.free < 2:
            crew.ended()
        for most, part in ((1, items[: number // 50]), (32, items)):
            begin, busy, done, marks = time.perf_counter(), cpu(), 0, []
            for step in spread(part, crew, most, str):
                done += len(step.results)
                if done >= len(part) * (len(marks) + 1) // 10:
                    marks.append(memory())
            seconds, busy = time.perf_counter() - begin, cpu() - busy
            memories = ", ".join(f"{mark:.0f}" for mark in marks)
            print(
                f"up to {most} items a part: {done} in {seconds:.2f} s, {1e6 * seconds / done:.0f} µs an item, "
                f"{1e6 * busy / done:.0f} of them computed by the command; memory {memories} MB",
                flush=True,
            )
            if most == 1:
                cost = busy / done
                print(
                    f"1,000 files on 100 machines: the command computes {1000 * cost:.1f} s in all; "
                    f"it is the limit where a machine needs less than {100 * cost:.2f} s for a file"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "faults", "driver"])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--items", type=int, default=100_000)
    args = parser.parse_args()
    if args.what == "driver":
        driver(args.items)
    elif args.model is None:
        parser.error("name a model")
    elif args.what == "speed":
        speed(args.model, args.workers, args.prompts)
    else:
        faults(args.model, args.prompts)


if __name__ == "__main__":
    main()
