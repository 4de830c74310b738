"""A disk that fails: each call fails once. Then the old file is whole or the new one is, and a sentence says it."""

import builtins
import errno
import io
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner, Result

import rwkv_cli
from rwkv_cli.main import cli
from rwkv_cli.models import State
from rwkv_cli.quant import Checkpoint

ERRORS = {errno.ENOSPC: "No space left on device", errno.EIO: "Input/output error", errno.EACCES: "Permission denied"}
CALLS = ("open", "write", "fsync", "replace", "link", "unlink", "mmap", "mkdir", "truncate")


class Disk:
    """Counts the calls that touch files below a folder, and has one of them fail."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.count, self.fails = str(folder), dict.fromkeys(CALLS, 0), ("", 0, 0)
        self.failed = False
        opened = io.open

        def open_(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            ours = isinstance(file, str | Path) and str(file).startswith(self.folder)
            if not ours:
                return opened(file, mode, *args, **options)
            self.call("open", file)
            stream = opened(file, mode, *args, **options)
            return self.failing(stream) if set(mode) & set("wxa+") else stream

        patch.setattr(builtins, "open", open_)
        patch.setattr(io, "open", open_)
        patch.setattr(Path, "open", lambda path, *args, **options: open_(path, *args, **options))
        for module, name in ((os, "fsync"), (os, "replace"), (os, "link"), (os, "unlink"), (os, "mkdir")):
            patch.setattr(module, name, self.wrapped(name, getattr(module, name)))
        patch.setattr("rwkv_cli.quant.checkpoint.mmap.mmap", self.wrapped("mmap", mmap.mmap))

    def call(self, name: str, what: object = None) -> None:
        """Count a call, or have it fail if it is the one."""
        self.count[name] += 1
        call, number, error = self.fails
        if (name, self.count[name]) == (call, number):
            self.failed = True
            raise OSError(error, ERRORS[error], *([str(what)] if isinstance(what, str | Path) else []))

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(first: Any, *args: Any, **options: Any) -> Any:
            if name in ("fsync", "mmap") or str(first).startswith(self.folder):
                self.call(name, first)
            return real(first, *args, **options)

        return wrapper

    def failing(self, stream: Any) -> Any:
        """The stream, whose writing may fail."""
        disk, real = self, stream

        class Failing:
            def write(self, data: Any) -> Any:
                disk.call("write")
                return real.write(data)

            def truncate(self, *args: Any) -> Any:
                disk.call("truncate")
                return real.truncate(*args)

            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def __enter__(self) -> "Failing":
                return self

            def __exit__(self, *_: object) -> None:
                real.close()

            def __iter__(self) -> Iterator[Any]:
                return iter(real)

        return Failing()


def whole(path: Path, model: Path) -> bool:
    """Return whether a file can be read to its end by what reads such files."""
    if path.name == "converted":
        checkpoint = Checkpoint(path)
        for name in checkpoint.stored:
            checkpoint.array(name)
    elif path.name in ("state", "cache"):
        State.load(path, rwkv_cli.load(model).new_state())
    elif path.name == "answers":
        content = path.read_bytes()
        return all(line.startswith(b'{"id"') and line.endswith(b"}") for line in content.splitlines()[:-1])
    return True


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_pth(tmp_path_factory.mktemp("faults") / "a.pth", tiny.weights("7", layers=1, vocab=256))


@pytest.mark.parametrize("what", ["convert", "state", "cache", "session", "batch"])
@pytest.mark.parametrize("error", list(ERRORS))
def test_every_call_may_fail_once(
    what: str, error: int, source: Path, byte_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "jobs").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    target = tmp_path / {"convert": "converted", "batch": "answers", "session": "unused"}.get(what, what)
    text = ["generate", "abc", "-m", str(byte_model), "-n", "2"]
    command = {
        "convert": ["convert", str(source), str(target), "--force"],
        "state": [*text, "--save-state", str(target)],
        "cache": [*text, "--prompt-cache", str(target)],
        "session": ["chat", "-m", str(byte_model), "-n", "2", "--session", "kept"],
        "batch": ["generate", "--batch", str(tmp_path / "jobs"), "-m", str(byte_model), "-n", "2", "--output",
                  str(target)],
    }[what]  # fmt: skip

    def run() -> Result:
        return CliRunner().invoke(cli, command, input="hello\n" if what == "session" else None)

    def turns() -> int:
        shown = CliRunner().invoke(cli, ["sessions", "show", "kept"])
        return shown.output.count("hello") if shown.exit_code == 0 else 0

    def anew() -> None:
        if what in ("batch", "cache"):  # nothing is written where the answers are there
            target.unlink(missing_ok=True)

    assert run().exit_code == 0
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path, patch)
        anew()
        assert run().exit_code == 0
        counts = dict(disk.count)
    assert counts["write"] > 0
    failed = 0
    for call, count in counts.items():
        for number in range(1, count + 1):
            anew()
            before = turns() if what == "session" else 0
            with monkeypatch.context() as patch:
                disk = Disk(tmp_path, patch)
                disk.fails = call, number, error
                result = run()
            case = f"{call} {number}: {result.output}"
            failed += disk.failed
            assert result.exception is None or isinstance(result.exception, SystemExit), (case, result.exception)
            if disk.failed and call in ("write", "fsync"):
                assert ERRORS[error] in result.output, case
            if result.exit_code:
                assert result.exit_code == 1, case
                assert "Error: " in result.output, case
            if result.exit_code == 0 and what in ("convert", "state"):
                assert target.exists(), case
            if target.exists():
                assert whole(target, byte_model), case
            if what == "session":
                assert turns() in (before, before + 1), case
            if what != "session":
                assert not [path for path in tmp_path.glob(".rwkv-*.part") if call != "unlink"], case
    assert failed > 5
    anew()
    assert run().exit_code == 0  # and nothing that is left is in the way
