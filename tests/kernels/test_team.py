"""Steps and the threads that run them: order, inputs that move, sleep, forks, and an end without a hang."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import rwkv_cli
from rwkv_cli.kernels.cpu.args import F64_1, View, unpack
from rwkv_cli.kernels.cpu.compile import kernel
from rwkv_cli.kernels.cpu.cores import Cores, usable_cores
from rwkv_cli.kernels.cpu.steps import Runnable, Share, Steps
from rwkv_cli.kernels.cpu.team import team
from rwkv_cli.kernels.program import Count, Input


class TurnArgs(NamedTuple):
    x: F64_1
    y: F64_1


@kernel(TurnArgs)
def turn(args: int, part: int, parts: int) -> None:  # noqa: ARG001
    """y[i] = Σ x + i: right only if all of x is there. Uneven work, so that somebody is late."""
    a = unpack(args, TurnArgs)
    x = a.x
    total = 0.0
    for _ in range(1 + part * 7 % 5 * 40):
        total = 0.0
        for i in range(len(x)):
            total += x[i]
    a.y[part] = total + part


def one_turn(x: Any, y: Any, parts: int) -> Runnable:
    steps = Steps()
    steps.add(turn, TurnArgs(x, y), Share.fixed(parts))
    return steps.finish()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("parts", [1, 2, 7])
def test_a_step_sees_all_that_came_before(threads: int, parts: int) -> None:
    a, b = np.arange(parts, dtype=float), np.zeros(parts)
    steps = Steps()
    for step in range(40):
        steps.add(turn, TurnArgs(*((a, b) if step % 2 == 0 else (b, a))), Share.fixed(parts))
    program = steps.finish()
    want = np.arange(parts, dtype=float)
    for _ in range(40):
        want = want.sum() + np.arange(parts)
    for _ in range(5):
        a[:] = np.arange(parts)
        program.run(threads)
        np.testing.assert_array_equal(a, want)


def test_steps_without_a_barrier_all_run() -> None:
    x, outputs = np.ones(3), [np.zeros(3) for _ in range(20)]
    steps = Steps()
    for y in outputs:
        steps.add(turn, TurnArgs(x, y), Share.fixed(3), barrier=False)
    total = np.zeros(20)
    steps.barrier()
    for y in outputs:
        steps.add(turn, TurnArgs(y, total), Share.fixed(1))
    steps.finish().run(3)
    for y in outputs:
        np.testing.assert_array_equal(y, [3, 4, 5])
    assert total[0] == 12


def test_inputs_move() -> None:
    """An argument inside an input is found in the array that takes its place, also one in the middle of it."""
    first, other, out = np.arange(8.0), np.arange(8.0) + 100, np.zeros(1)
    given, steps = Input("given", (8,), "F64"), Steps()
    middle = View(given, (3,), np.dtype(np.float64), offset=16)
    steps.add(turn, TurnArgs(middle, out), Share.fixed(1))
    program = steps.finish([given])
    program.run(2, {"given": first})
    assert out[0] == 9
    program.run(2, {"given": other})
    assert out[0] == 309


def test_the_number_of_rows_is_read_in_each_run() -> None:
    """As an array's length, and as the number of parts: none, one where there is little to do, else as many as fit."""
    count, out, steps = Count(50), np.zeros(64), Steps()
    given = Input("given", (count,), "F64")
    view = View(given, given.shape, np.dtype(np.float64))
    steps.add(turn, TurnArgs(view, out), Share(count, columns=1 << 13, per_row=1, most=4))
    program = steps.finish([given])
    for n, parts in ((5, 4), (0, 0), (1, 1), (3, 3), (50, 4)):
        out[:] = -1
        program.run(2, {"given": np.ones(n)})
        np.testing.assert_array_equal(out[:parts], n + np.arange(parts))
        assert (out[parts:] == -1).all()


def test_wrong_arguments_are_refused_before_they_are_addresses() -> None:
    x = np.zeros(4)
    for wrong in (x.astype(np.float32), x.reshape(2, 2), np.zeros(8)[::2]):
        with pytest.raises(TypeError, match="expected"):
            one_turn(wrong, x, 1)
    with pytest.raises(TypeError, match="turn takes TurnArgs, not tuple"):
        Steps().add(turn, (x, x), Share.fixed(1))  # type: ignore[arg-type]


def test_threads_that_slept_come_back() -> None:
    x, y = np.ones(4), np.zeros(4)
    program = one_turn(x, y, 4)
    for pause in (0, 0.3, 0.001, 0.2):
        time.sleep(pause)
        y[:] = 0
        program.run(3)
        np.testing.assert_array_equal(y, [4, 5, 6, 7])


def test_several_callers_and_teams_at_once(byte_model: Path) -> None:
    models = [rwkv_cli.load(byte_model, threads=threads) for threads in (None, 1)]
    want, _ = models[0].forward([1, 2, 3])
    wrong: list[Any] = []

    def call(model: Any) -> None:
        for _ in range(30):
            if not np.array_equal(model.forward([1, 2, 3])[0], want):
                wrong.append(model)

    threads = [threading.Thread(target=call, args=(models[i % 2],)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork; nothing to go wrong")
def test_a_forked_child_has_a_team_of_its_own(byte_model: Path) -> None:
    code = (
        "import os, sys, warnings, numpy as np, rwkv_cli\nwarnings.simplefilter('ignore')\n"
        "model = rwkv_cli.load(sys.argv[1])\nwant = model.forward([1, 2])[0]\nchild = os.fork()\n"
        "same = np.array_equal(model.forward([1, 2])[0], want)\n"
        "if child == 0: os._exit(0 if same else 3)\nprint(same, os.waitpid(child, 0)[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(byte_model)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "True 0\n", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork; nothing to go wrong")
def test_a_child_forked_while_a_thread_computes_can_compute(byte_model: Path) -> None:
    code = (
        "import os, sys, threading, time, warnings, numpy as np, rwkv_cli\nwarnings.simplefilter('ignore')\n"
        "model = rwkv_cli.load(sys.argv[1])\nwant = model.forward([1, 2])[0]\n"
        "def compute():\n    while True: model.forward(np.arange(20000) % 200)\n"
        "threading.Thread(target=compute, daemon=True).start()\n"
        "while not model._turn.locked(): time.sleep(0.001)\nchild = os.fork()\n"
        "if child == 0: os._exit(0 if np.array_equal(model.forward([1, 2])[0], want) else 3)\n"
        "for _ in range(300):\n    done, status = os.waitpid(child, os.WNOHANG)\n    if done: break\n"
        "    time.sleep(0.1)\nelse:\n    os.kill(child, 9)\n"
        "print(bool(done), status, flush=True)\nos._exit(0)\n"
    )
    command = [sys.executable, "-P", "-c", code, str(byte_model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "True 0\n", done.stderr


def test_a_process_ends_though_its_threads_wait(byte_model: Path) -> None:
    code = "import sys, time, rwkv_cli\nrwkv_cli.load(sys.argv[1]).forward([1])\ntime.sleep(float(sys.argv[2]))"
    for pause in ("0", "0.2"):  # spinning, asleep
        done = subprocess.run([sys.executable, "-P", "-c", code, str(byte_model), pause], timeout=120, check=False)
        assert done.returncode == 0


def test_cores_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from rwkv_cli.kernels.cpu import cores

    real = Path.read_text
    siblings: Callable[[int], str] = lambda cpu: f"{cpu % 4},{cpu % 4 + 4}\n"  # noqa: E731
    quota = "max 100000\n"

    def read(self: Path, *args: Any, **kwargs: Any) -> str:
        if self.name == "thread_siblings_list":
            return siblings(int(self.parts[-3][3:]))
        return quota if self.name == "cpu.max" else real(self, *args, **kwargs)

    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", read)
    assert usable_cores() == Cores(8, 4)
    quota = "250000 100000\n"
    assert usable_cores() == Cores(3, 3)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {2, 6}, raising=False)
    assert usable_cores() == Cores(2, 1)


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000", "cpu.max": "max 100000"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "100000 100000", "a/cpu.max": "300000 100000"}, 1),
        ("0::/elsewhere", {"cpu.max": "200000 100000"}, 2),
        ("3:cpu,cpuacct:/a\n2:memory:/a", {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}, 1),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ("2:memory:/", {}, 4),
    ],
)  # fmt: skip
def test_the_quota_is_that_of_the_process_own_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str, files: dict[str, str], cores: int
) -> None:
    from rwkv_cli.kernels.cpu import cores as module

    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    real = Path.read_text

    def read(self: Path, *args: Any, **kwargs: Any) -> str:
        if self.name == "thread_siblings_list":
            return self.parts[-3]
        return own + "\n" if self == Path("/proc/self/cgroup") else real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(module, "_CGROUPS", tmp_path)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert usable_cores() == Cores(cores, cores)


def test_a_team_is_made_once() -> None:
    assert team(2) is team(2)


def test_no_steps_do_nothing() -> None:
    x, y = np.ones(4), np.zeros(4)
    program, nothing = one_turn(x, y, 4), Steps().finish()
    for _ in range(200):
        nothing.run(2)
        y[:] = 0
        program.run(2)
        np.testing.assert_array_equal(y, [4, 5, 6, 7])


def test_ids_and_targets_may_share_memory(byte_model: Path) -> None:
    model = rwkv_cli.load(byte_model)
    text, other = np.arange(40) % 200, (np.arange(40) * 7) % 200
    model.losses(text[:-1], text[1:], model.new_state())
    got = model.losses(other[:-1], list(text[1:]), model.new_state())
    want = rwkv_cli.load(byte_model).losses(list(other[:-1]), list(text[1:]), model.new_state())
    np.testing.assert_array_equal(got, want)
