"""Work on a Ray cluster of this machine, with workers that die; and all that needs no Ray."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import Result
from extras import needs

from rwkv_cli.engine import cluster
from rwkv_cli.engine.cluster import Cluster, Place, _Missing, _Worker, connected, program
from rwkv_cli.engine.handed import Handed
from rwkv_cli.engine.spread import Ended, Failure, spread
from rwkv_cli.errors import WorkerError

Run = Callable[..., Result]
PLACE = Place("local", 1, 1, "cpu")


@dataclass(frozen=True)
class Echo:
    """A model that does nothing: each item comes back with the bytes of its file."""

    files: tuple[Handed, ...]
    texts: tuple[Handed, ...] = ()
    scene: Path = Path()

    def files_of(self, item: int) -> tuple[Handed, ...]:  # noqa: ARG002
        return self.texts

    def open(self, places: Mapping[Handed, Path], device: str, threads: int) -> Callable[..., list[Any]]:
        head = [places[file].read_bytes()[:3] for file in self.files]

        def do(items: Sequence[int], places: Mapping[Handed, Path]) -> list[Any]:
            for item in items:
                if (self.scene / f"kill-{item}").exists():
                    (self.scene / f"kill-{item}").unlink()
                    os.kill(os.getpid(), signal.SIGKILL)
                if (self.scene / f"wrong-{item}").exists():
                    raise ValueError("is odd")
            return [(item, device, threads, head, [places[text].read_bytes() for text in self.texts]) for item in items]

        return do


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").write_bytes(b"Once upon a time")
    return tmp_path / "text"


def test_a_file_is_known_by_its_bytes(text: Path) -> None:
    handed = Handed.text(text)
    assert handed.here()
    text.write_bytes(b"Once upon a tame")
    assert not handed.here()
    text.unlink()
    assert not handed.here()


def test_a_model_is_known_by_its_header(byte_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(byte_model.read_bytes())
    handed = Handed.model(path)
    assert handed.here()
    assert handed.marked < handed.size / 2
    path.write_bytes(path.read_bytes().replace(b'"digest":"', b'"digest":"0', 1)[: handed.size])
    assert not handed.here()


def test_a_file_is_brought_as_it_was(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_cli.engine.handed._PIECE", 5)
    handed = Handed.text(text)
    assert [len(piece) for piece in handed.pieces()] == [5, 5, 5, 1]
    handed.write(handed.pieces(), tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == text.read_bytes()
    text.write_bytes(b"Once upon a tame")
    with pytest.raises(WorkerError, match="text: has changed since the command began; run it again"):
        handed.write(handed.pieces(), tmp_path / "there")


def test_a_worker_asks_for_what_it_lacks(text: Path) -> None:
    handed = Handed.text(text)
    lacking = dataclasses.replace(handed, path=text.with_name("nowhere"))
    worker: Any = _Worker(Echo((handed, lacking)), PLACE, 1, program())
    assert worker.start({}) == _Missing([lacking])
    worker = _Worker(Echo((handed,), (lacking,)), PLACE, 1, program())
    assert worker.start({}) is None
    assert worker.run([5], {}) == _Missing([lacking])


def test_a_worker_finds_the_item_that_fails(text: Path, tmp_path: Path) -> None:
    worker: Any = _Worker(Echo((Handed.text(text),), scene=tmp_path), PLACE, 1, program())
    assert worker.start({}) is None
    (tmp_path / "wrong-2").touch()
    good = [(item, "cpu", 1, [b"Onc"], []) for item in range(4)]
    assert worker.run(range(4), {}) == [*good[:2], Failure("ValueError: is odd"), good[3]]


def test_workers_have_the_same_program() -> None:
    worker: Any = _Worker(Echo(()), PLACE, 1, "rwkv-cli 0.0.1 (kernels-0)")
    said = worker.start({}).reason
    assert f"has {program()} and this machine has rwkv-cli 0.0.1 (kernels-0); install the same rwkv-cli" in said


def test_a_missing_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkerError, match=r'--ray needs Ray; install it with: pip install "rwkv-cli\[ray\]"'):
        connected(PLACE, Echo(())).__enter__()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "[::1]:9", "127.0.0.1:99999"])
def test_an_address_where_nobody_listens_is_named_at_once(address: str) -> None:
    with pytest.raises(
        WorkerError, match=r"no Ray cluster can be reached at \S+ \(.*\); begin one there with: ray start"
    ):
        cluster._check_reachable(address, "127.0.0.1")


class Here:
    """A crew of one worker, which is this process."""

    def __init__(self, place: Place, work: Any) -> None:
        self.worker: Any = _Worker(work, place, 1, program())
        assert self.worker.start({}) is None
        self.size = self.free = 1
        self.begun: list[tuple[range, Any]] = []

    def begin(self, part: range, items: Any) -> None:
        self.free = 0
        self.begun.append((part, items))

    def ended(self) -> list[Ended[Any]]:
        self.free = 1
        begun, self.begun = self.begun, []
        return [Ended(part, self.worker.run(items, {})) for part, items in begun]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a cluster are this process."""
    monkeypatch.setattr(cluster, "connected", lambda place, work: contextlib.nullcontext(Here(place, work)))


@pytest.mark.usefixtures("here")
def test_a_batch_is_the_same_when_it_is_spread(rwkv: Run, byte_model: Path, tmp_path: Path) -> None:
    prompts, alone, out = (tmp_path / name for name in ("prompts", "alone", "out"))
    prompts.write_text("".join(f'{{"prompt": "Once {i}", "max_tokens": {5 + i % 3}}}\n' for i in range(20)))
    state = tiny.write_pth(
        tmp_path / "state.pth", {f"blocks.{i}.att.time_state": np.full((3, 16, 16), 0.5, np.float32) for i in range(3)}
    )
    common = ["generate", "--batch", prompts, "-m", byte_model, "--seed", 3, "--state", state]
    assert rwkv(*common, "-o", alone, "--batch-size", 1).exit_code == 0
    assert rwkv(*common, "--ray", "local").stdout == alone.read_text()
    lines = alone.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:7]) + lines[7][:40])
    result = rwkv(*common, "-o", out, "--ray", "127.0.0.1:6379", "--ray-workers", 4, "--batch-size", 2)
    assert "20 prompts answered, 7 of them before" in result.stderr
    assert out.read_bytes() == alone.read_bytes()
    assert "20 of them before" in rwkv(*common, "-o", out, "--ray").stderr


@pytest.mark.usefixtures("here")
def test_scores_are_the_same_when_they_are_spread(rwkv: Run, byte_model: Path, tmp_path: Path) -> None:
    texts = [tmp_path / f"text{i}" for i in range(5)]
    for i, text in enumerate(texts):
        text.write_text(f"Once upon {i} times,\r\n" * (i + 1))
    for options in ([], ["--compare", byte_model, "--context", 9, "--limit", 40]):
        common = ["ppl", *texts, "-m", byte_model, "--json", *options]
        results = [rwkv(*common), rwkv(*common, "--ray", "local")]
        figures = [[json.loads(line) for line in result.stdout.splitlines()] for result in results]
        for record in itertools.chain(*figures):
            del record["tokens_per_second"]
        assert figures[0] == figures[1]
        assert len(figures[0]) == 5
        assert [result.stderr.count("text2 has line breaks of Windows") for result in results] == [1, 1]
    texts[3].write_text("")
    result = rwkv(*common, "--ray", "local")
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 3
    assert result.stderr.endswith(f"Error: {texts[3]}: is empty, so there is nothing to score\n")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--ray", "text"), "text is not local, auto or HOST:PORT; write --ray local, or put --ray at the end"),
        (("--ray", "ray://host:1"), "ray://host:1 is not local"),
        (("--ray-workers", "2"), "--ray-workers goes with --ray only"),
        (("--ray", "local", "--device", "auto"), "--device auto does not go with --ray"),
        (("--ray", "local", "-"), "- does not go with --ray; name a file"),
    ],
)
def test_options_that_do_not_go_with_it(rwkv: Run, args: tuple[str, ...], says: str) -> None:
    result = rwkv("ppl", __file__, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two machines with a core each, both of them this one."""
    os.environ |= cluster.ENVIRONMENT
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # which keeps it to the loopback interface on any system
    needs("ray", "dev,reference", "test_spread.py covers the order of results and work that fails")
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False  # the same for this process
    from ray.cluster_utils import Cluster as Machines

    own = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": 100 << 20}
    machines = Machines(initialize_head=True, head_node_args=own)
    machines.add_node(num_cpus=1, node_ip_address="127.0.0.1", object_store_memory=100 << 20)
    yield machines.address
    machines.shutdown()


@contextlib.contextmanager
def crew(address: str, work: Echo) -> Iterator[Cluster[int, Any]]:
    """A crew whose workers know this module."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with connected(Place(address, None, 1, "cpu"), work) as made:
        yield made


def test_lost_workers_and_lacking_files_change_nothing(
    address: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kill-7").touch()
    (tmp_path / "kill-30").touch()
    with text.open("rb") as file:  # under this name only this process has it
        hidden = Handed.text(Path(f"/proc/self/fd/{file.fileno()}"))
        work = Echo((Handed.text(text), hidden), (hidden,), tmp_path)
        with crew(address, work) as workers:
            steps = list(spread(range(40), workers, 4, str))
    results = [result for step in steps for result in step.results]
    assert results == [(item, "cpu", 1, [b"Onc"] * 2, [text.read_bytes()]) for item in range(40)]
    assert steps[-1].lost == 2
    assert max(step.workers for step in steps) == 2
    assert capfd.readouterr().out == ""


def test_commands_give_the_same_on_a_cluster(address: str, rwkv: Run, byte_model: Path, tmp_path: Path) -> None:
    prompts, here, there = (tmp_path / name for name in ("prompts", "here", "there"))
    prompts.write_text("".join(f'{{"prompt": "Once {i}", "max_tokens": {5 + i % 3}}}\n' for i in range(20)))
    common = ["generate", "--batch", prompts, "--seed", 3]
    assert rwkv(*common, "-m", byte_model, "-o", here, "--batch-size", 1).exit_code == 0
    with byte_model.open("rb") as file:
        hidden = f"/proc/self/fd/{file.fileno()}"
        result = rwkv(*common, "-m", hidden, "-o", there, "--batch-size", 2, "--ray", address)
    assert result.exit_code == 0, result.output
    assert there.read_bytes() == here.read_bytes()
