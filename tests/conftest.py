"""Things that every test may use: tiny converted models, the shared data where it lies, and a cache of its own."""

import os
import signal

# numba reads it when it is imported: the tests' CUDA kernels run in its simulator, which needs no GPU
PTX = os.environ.get("RWKV_TEST_PTX", "")
os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "0" if PTX else "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner, Result

# no test sees the models and the settings of the user who runs it
os.environ["RWKV_MODELS"] = os.environ["RWKV_CONFIG"] = os.devnull

SHARED = Path(os.environ.get("RWKV_TEST_DATA", Path(__file__).resolve().parents[2] / "shared"))


if PTX:
    from ptx import gpu

    gpu.use(tuple(map(int, PTX.split("."))))


def pytest_configure() -> None:
    """Have Ctrl-C do what it does in a terminal. A background shell has its jobs ignore it, and so would all processes
    that tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints and texts; tests that need it are skipped where it is missing."""
    if not (SHARED / "checkpoints").is_dir():
        pytest.skip("no folder of real checkpoints and texts (RWKV_TEST_DATA); tests beside this one use made-up ones")
    return SHARED


@pytest.fixture
def rwkv(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in this process. Any exception but a click error or exit is a failure with its traceback."""
    from rwkv_cli.main import cli

    monkeypatch.delenv("RWKV_MODEL", raising=False)

    def run(*args: object, input: str | bytes | None = None) -> Result:
        return CliRunner().invoke(cli, [str(a) for a in args], input=input, catch_exceptions=False)

    return run


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny random model of a version, converted; made once a session for each set of arguments."""
    from rwkv_cli.main import cli

    folder = tmp_path_factory.mktemp("models")
    made: dict[tuple[object, ...], Path] = {}

    def make(version: str = "7", quant: str = "int8", **sizes: int) -> Path:
        key = (version, quant, *sorted(sizes.items()))
        if key not in made:
            source = tiny.write_pth(folder / f"{len(made)}.pth", tiny.weights(version, **sizes), "F32")
            made[key] = folder / f"{len(made)}.safetensors"
            result = CliRunner().invoke(
                cli, ["convert", str(source), str(made[key]), "--quant", quant, "--calibrate", "none"]
            )
            assert result.exit_code == 0, result.output
        return made[key]

    return make


@pytest.fixture(scope="session")
def byte_model(converted: Callable[..., Path]) -> Path:
    """A tiny RWKV-7 over bytes, which reads and writes any text."""
    return converted("7", vocab=256)


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model over bytes that has learnt nothing writes mostly what is no text; let it pick from four."""
    from rwkv_cli.engine.sampling import Sampler

    sample = Sampler.sample

    def picked(sampler: Sampler, logits: Any) -> int:
        return sample(sampler, np.where([i in b"ab \n" for i in range(256)], logits, -1e30))

    monkeypatch.setattr(Sampler, "sample", picked)
