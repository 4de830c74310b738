"""What is to be run on a GPU runs without one, as far as it can: simulated, on a false driver, with stand-ins."""

import gc
import importlib
import importlib.util
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from extras import needs
from false_driver import use_false_driver
from lab import REAL_GPU, guarded_gpu
from simulator import use_greenlets

import rwkv_cli

needs("numba_cuda", "dev")
if REAL_GPU:
    pytest.skip("this is a real GPU, which benchmarks/gpu_all.sh runs them on", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RANKS = {"w": 8, "a": 8, "v": 8, "g": 8}


def script(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """A module of benchmarks/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def test_the_sanitizers_program(monkeypatch: pytest.MonkeyPatch) -> None:
    sanitize = script(monkeypatch, "gpu_sanitize")
    with guarded_gpu(monkeypatch):
        loss = sanitize.run_all(sanitize.config_of("4", 1, 32, 16, 8, {}), "int8", (1, 2))
    assert 1 < loss < 4


@pytest.fixture
def _false_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_false_driver(monkeypatch)
    use_greenlets(monkeypatch)
    yield
    gc.collect()  # frees what is the false driver's


@pytest.mark.usefixtures("_false_driver")
def test_steps_are_told_and_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the false driver, which only counts replays."""
    steps = script(monkeypatch, "gpu_steps")
    read = steps.write_model(tmp_path / "m", steps.config_of("7", 3, 16, 16, 8, RANKS))
    model = rwkv_cli.load(tmp_path / "m", device="cuda")
    monkeypatch.setattr(steps, "LEAST_SECONDS", 0.0)
    steps.measure(model, 1, read, 1e9)
    told = capsys.readouterr().out
    assert "T = 1: 33 launches, 9 a layer, graph; " in told
    assert told.count("matvec 8 ") == 6
    assert told.count("norm_shift ×1 spread") == 2


def stand_in(folder: Path, name: str, says: str) -> Path:
    """A program that writes its name and arguments to `says` and fails if $FAIL is among them."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "{name} $*" >>{says}\ncase "$*" in *"$FAIL"*) exit 1;; esac\n')
    path.chmod(0o755)
    return path


def run_all(tmp_path: Path, *parts: str, fail: str = "NOTHING") -> tuple[Any, list[str]]:
    """Run gpu_all.sh with stand-ins for what it runs: what became of it, and the lines of what was run."""
    said = tmp_path / "said"
    said.write_text("")
    for name in ("python", "compute-sanitizer", "nvidia-smi"):
        stand_in(tmp_path, name, str(said))
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_all.sh"), *parts], capture_output=True, text=True,
        env=os.environ | {"PATH": path, "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path), "FAIL": fail},
    )  # fmt: skip
    return done, said.read_text().splitlines()


def test_one_command_runs_all_that_a_gpu_can_say(tmp_path: Path) -> None:
    done, lines = run_all(tmp_path)
    assert done.returncode == 0, done.stderr
    for wanted in (
        "python -m pytest tests/kernels -k cuda", "python benchmarks/gpu.py --json", "gpu_steps.py 32 4096",
        "gpu_steps.py 24 2048", *(f"compute-sanitizer --tool {t}check" for t in ("mem", "race", "sync", "init")),
    ):  # fmt: skip
        assert any(wanted in line for line in lines), wanted
    for line in lines:
        for word in line.split():
            assert not word.endswith(".py") or (BENCHMARKS.parent / word).is_file()
    assert {"oracle.log", "bench.log", "steps-7.2B.log", "san-initcheck.log"} <= {p.name for p in tmp_path.iterdir()}


def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    done, lines = run_all(tmp_path, "bench", "steps", fail="gpu.py")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "failed: bench"
    assert sum("gpu_steps.py" in line for line in lines) == 2
    done, lines = run_all(tmp_path, "speed")
    assert (done.returncode, lines[1:]) == (2, ["nvidia-smi -L"])
