"""A file that is written replaces regular files only, and a file that is read is one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from click.testing import Result

import rwkv_cli
from rwkv_cli.errors import FormatError
from rwkv_cli.models import State
from rwkv_cli.quant import replacing

Run = Callable[..., Result]


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "below" / "target")
    for text in (b"new", b"newer"):  # the target of the first is not there yet
        with replacing(tmp_path / "link") as file:
            file.write(text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "below" / "target").read_bytes() == text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["below", "link", "target"]


def test_a_pipe_is_not_replaced(pipe: Path) -> None:
    with pytest.raises(FormatError, match="is a device or a pipe, not a file"), replacing(pipe):
        pytest.fail("it was opened")
    assert pipe.is_fifo()
    assert list(pipe.parent.iterdir()) == [pipe]


def test_devices_are_named(rwkv: Run, byte_model: Path, pipe: Path) -> None:
    says = "is a device or a pipe, not a file"
    for path in (Path("/dev/null"), pipe):
        tiny.refused(rwkv("generate", "a", "-m", byte_model, "--save-state", path), f"{path} {says}")
        tiny.refused(rwkv("generate", "a", "-m", byte_model, "--load-state", path), f"{path} {says}")
        tiny.refused(rwkv("generate", "a", "-m", byte_model, "--prompt-cache", path), f"{path} {says}")
        tiny.refused(rwkv("generate", "a", "-m", byte_model, "--state", path), f"{path} {says}")
        tiny.refused(rwkv("info", path), f"{path} {says}")
        tiny.refused(rwkv("convert", path), f"{path} {says}")
        tiny.refused(rwkv("convert", byte_model.with_suffix(".pth"), path, "--force"), f"{path} {says}")
        with pytest.raises(FormatError, match=says):
            rwkv_cli.load(byte_model).new_state().save(path)
        with pytest.raises(FormatError, match=says):
            State.load(path, rwkv_cli.load(byte_model).new_state())
    assert pipe.is_fifo()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    left, fresh, other = (tmp_path / name for name in (".rwkv-0.part", ".rwkv-1.part", ".rwkv-x.txt"))
    for path in (left, fresh, other):
        path.write_bytes(b"half")
    with replacing(tmp_path / "slow") as slow:
        (living,) = {*tmp_path.iterdir()} - {left, fresh, other}
        for path in (left, other, living):
            os.utime(path, (0, 0))
        with replacing(tmp_path / "quick") as quick:
            quick.write(b"whole")
        assert {*tmp_path.iterdir()} == {fresh, other, living, tmp_path / "quick"}
        slow.write(b"whole, too")
    assert (tmp_path / "slow").read_bytes() == b"whole, too"


def test_a_killed_process_leaves_nothing_for_long(tmp_path: Path) -> None:
    code = (
        "import os, signal, pathlib; from rwkv_cli.quant import replacing\n"
        f"with replacing(pathlib.Path({str(tmp_path / 'a')!r})): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code])
    (left,) = tmp_path.iterdir()
    os.utime(left, (0, 0))
    with replacing(tmp_path / "b") as file:
        file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
