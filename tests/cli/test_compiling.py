"""Kernels are compiled before any output, once, with a counter, wherever the program lies, and after all checks."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from extras import needs
from numba.core.event import Event, Listener, register, unregister

from rwkv_cli.terminal.compiling import load_kernels

Run = Callable[..., Result]

COUNTED = """
from numba.core.event import end_event, start_event
from rwkv_cli.terminal.compiling import load_kernels

class Kernel:
    def load(self):
        start_event("numba:compile")
        end_event("numba:compile")
        input()

load_kernels([Kernel() for _ in range(3)])
print("OUTPUT")
"""

# One kernel in a module that lies at another place in each run
KEPT = """
import sys
from rwkv_cli.kernels.cache import on_first_compilation
sys.path.insert(0, sys.argv[1])
import one
with on_first_compilation(lambda: print("compiled")):
    one.one.load()
"""
ONE = """
from typing import NamedTuple
from rwkv_cli.kernels.cpu.args import Int, unpack
from rwkv_cli.kernels.cpu.compile import kernel
from rwkv_cli.kernels.cpu.elementwise import span

class Args(NamedTuple):
    n: Int

@kernel(Args)
def one(args, part, parts):
    a = unpack(args, Args)
    begin, end = span(part, parts, a.n)
"""


def test_a_counter_shows_how_many_are_done() -> None:
    pexpect = needs("pexpect", "dev")
    env = {**os.environ, "TERM": "xterm-256color"}
    child = pexpect.spawn(sys.executable, ["-P", "-c", COUNTED], timeout=60, dimensions=(24, 100), env=env)
    for done in ("0/3", "1/3", "2/3"):
        child.expect_exact(done)
        child.sendline()
    child.expect_exact("OUTPUT")
    child.expect(pexpect.EOF)


def test_a_program_at_another_place_compiles_nothing_again(tmp_path: Path) -> None:
    said = []
    for name in ("a", "b"):
        folder = tmp_path / name / "same"
        folder.mkdir(parents=True)
        (folder / "one.py").write_text(ONE)
        done = subprocess.run([sys.executable, "-P", "-c", KEPT, str(folder)], capture_output=True, text=True,
                              check=True, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")})  # fmt: skip
        said.append(done.stdout)
    assert said == ["compiled\n", ""]


class _Order(Listener):
    """The events of a run, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_start(self, event: Event) -> None:  # noqa: ARG002 - the library's interface
        self.events.append("compiled")

    def on_end(self, event: Event) -> None:
        pass


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "some text", "-n", "3"],
        ["ppl", "TEXT"],
        ["ppl", "TEXT", "--compare", "OTHER"],
        ["bench", "-p", "3", "-n", "1", "-r", "1"],
        ["chat", "some text", "-n", "3"],
    ],
    ids=" ".join,
)
def test_everything_is_compiled_before_the_first_pass(
    args: list[str], rwkv: Run, byte_model: Path, converted: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Kernels that no counter has loaded would be loaded in the first pass. `load` is counted, `address` is not."""
    from rwkv_cli.kernels.cpu import compile as compiling
    from rwkv_cli.kernels.cpu import limits
    from rwkv_cli.models.base import Model

    loaded: set[Any] = set()
    real_load, real_run = compiling.Kernel.load, Model._run
    monkeypatch.setattr(compiling.Kernel, "load", lambda self: (loaded.add(self), real_load(self)))
    monkeypatch.setattr(limits, "_BYTES", 1 << 20)
    late: list[str] = []
    real_address = compiling.Kernel.address.fget
    assert real_address is not None
    running = False

    def run(self: Any, *rest: Any, **named: Any) -> Any:
        nonlocal running
        running = True
        return real_run(self, *rest, **named)

    def address(self: Any) -> Any:
        if self not in loaded:
            late.append(self.name)
        return real_address(self)

    monkeypatch.setattr(Model, "_run", run)
    monkeypatch.setattr(compiling.Kernel, "address", property(address))
    (tmp_path / "text").write_text("some text to be scored, of more than one token")
    names = {"TEXT": str(tmp_path / "text"), "OTHER": str(converted("7", "none", vocab=256))}
    result = rwkv(*(names.get(arg, arg) for arg in args), "-m", byte_model)
    assert result.exit_code == 0, result.output
    assert running
    assert loaded
    assert late == []


@pytest.mark.parametrize("other", [[], ["--compare", "OTHER"]], ids=["alone", "beside another"])
@pytest.mark.parametrize(("kind", "least"), [("file", 47), ("utf-16", 60), ("pipe", 1 << 20)])
def test_one_counter_counts_what_a_text_needs_too(
    kind: str, least: int, other: list[str], rwkv: Run, byte_model: Path, converted: Callable[..., Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Tokenizers of long texts have compiled code. How long a text is in UTF-8 is not known before it is read."""
    from rwkv_cli.engine.tokenizer import ByteTokenizer
    from rwkv_cli.terminal import compiling

    class Splitter:
        def load(self) -> None:
            pass

    splitter, counted = Splitter(), []
    monkeypatch.setattr(ByteTokenizer, "kernels", lambda _, size: [splitter] if size >= least else [])
    load = compiling.load_kernels
    for module in ("rwkv_cli.commands.options", "rwkv_cli.terminal.compiling"):
        monkeypatch.setattr(f"{module}.load_kernels", lambda kernels: (counted.append(list(kernels)), load(kernels)))
    text, path = "some text to be scored, of more than one token!", tmp_path / "text"
    if kind == "pipe":
        os.mkfifo(path)
        threading.Thread(target=path.write_text, args=[text]).start()
    else:
        path.write_text("語" * 20 if kind == "utf-16" else text, encoding="utf-16" if kind == "utf-16" else "utf-8")
    names = [str(converted("7", "none", vocab=256)) if arg == "OTHER" else arg for arg in other]
    result = rwkv("ppl", path, "-m", byte_model, *names)
    assert result.exit_code == 0, result.output
    assert [splitter in kernels for kernels in counted] == [True]
    assert len(counted[0]) > 1


@pytest.mark.parametrize(
    "args",
    [
        ["generate", ""],
        ["generate", "a", "--state", "MISSING"],
        ["generate", "a", "--load-state", "MISSING"],
        ["generate", "a", "--save-state", "/proc/x"],
        ["generate", "a", "--prompt-cache", "MISSING/x"],
        ["generate", "--batch", "MISSING"],
        ["chat", "a", "--state", "MISSING"],
        ["ppl", "MISSING"],
        ["prompt", "MISSING"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_found_before_anything_is_loaded(
    args: list[str], rwkv: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwkv_cli.commands import options

    if "/proc/x" in args and not sys.platform.startswith("linux"):
        pytest.skip("there is no /proc")
    for name in ("named_model", "load_kernels"):
        monkeypatch.setattr(options, name, lambda *_: pytest.fail("loaded"))
    listener = _Order()
    register("numba:compile", listener)
    try:
        result = rwkv(*(arg.replace("MISSING", str(tmp_path / "missing")) for arg in args))
    finally:
        unregister("numba:compile", listener)
    assert result.exit_code in (1, 2)
    assert listener.events == []


def test_an_interrupt_while_a_kernel_loads_is_not_lost() -> None:
    """LLVM calls Python while it loads code, and what is raised there is only printed."""
    loaded = []

    class Loading:
        def load(self) -> None:
            def called() -> None:
                os.kill(os.getpid(), signal.SIGINT)
                loaded.append(self)

            ctypes.CFUNCTYPE(None)(called)()

    with pytest.raises(KeyboardInterrupt):
        load_kernels([Loading(), Loading()])
    assert len(loaded) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
