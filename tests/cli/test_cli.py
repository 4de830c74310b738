"""The command as a whole: help, start-up, wording of errors, what reaches a terminal; and rwkv info."""

import errno
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import tiny
from click.testing import Result
from safetensors.numpy import load_file, save_file

import rwkv_cli.engine.sessions  # noqa: F401 - with all it imports, before a test patches something below it
from rwkv_cli import __version__, main
from rwkv_cli.errors import DeviceError, FormatError, TokenizerError, UnsupportedModelError
from rwkv_cli.terminal import output as terminal

Run = Callable[..., Result]


@pytest.mark.parametrize("command", main.COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_explains_itself(rwkv: Run, command: str, option: str) -> None:
    result = rwkv(command, option)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: cli {command} ")
    assert f"rwkv {command} " in result.stdout  # an example
    for parameter in main.cli.get_command(click.Context(main.cli), command).params:  # type: ignore[union-attr]
        if isinstance(parameter, click.Option):
            assert parameter.help
            assert parameter.opts[-1] in result.stdout
    assert "None]" not in result.stdout


@pytest.mark.parametrize(
    "command", [*main.COMMANDS, "models path", "models rm", "sessions list", "sessions show", "sessions rm", ""]
)
def test_help_fits_a_terminal(rwkv: Run, command: str) -> None:
    text = rwkv(*command.split(), "--help").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "\\b" not in text


def test_a_group_alone_shows_its_help(rwkv: Run) -> None:
    for group in ([], ["sessions"]):
        assert rwkv(*group).stderr.strip() == rwkv(*group, "--help").stdout.strip()


def test_help_lists_the_commands(rwkv: Run) -> None:
    result = rwkv("--help")
    assert result.exit_code == 0
    for name, line in main.COMMANDS.items():
        assert f"  {name}" in result.stdout
        assert line in result.stdout
    assert rwkv("--version").stdout == f"rwkv, version {__version__}\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [(("convrt",), "No such command"), (("--nope",), "No such option"), (("genrate",), "Did you mean 'generate'?"),
     (("run", "m.gguf"), "Did you mean 'chat'?"), (("chat", "-n", "x"), "'x' is not a valid whole number."),
     (("chat", "--top-p", "x"), "'x' is not a valid number."),
     (("chat", "--nope"), "No such option"), (("info", "a", "b"), "unexpected extra argument")],
)  # fmt: skip
def test_wrong_usage_ends_with_2(rwkv: Run, args: tuple[str, ...], says: str) -> None:
    result = rwkv(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr.splitlines()[-1]


def test_help_loads_no_heavy_library() -> None:
    code = """if True:
        import contextlib, io, sys
        from rwkv_cli.main import COMMANDS, main
        def loaded(*args):
            sys.argv = ["rwkv", *args]
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
                main()
            assert "Usage: rwkv" in out.getvalue()
            return sorted({"numba", "numpy", "rich", "tokenizers", "safetensors", "torch"} & set(sys.modules))
        print(loaded("--help"), [loaded(name, "--help") for name in COMMANDS])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"[] {[[]] * len(main.COMMANDS)}\n"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FormatError("a.st: broken"), "a.st: broken"),
        (UnsupportedModelError("a.pth: unknown"), "a.pth: unknown"),
        (TokenizerError("a: none"), "a: none"),
        (DeviceError("no such"), "no such"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), "x: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("odd"), "odd"),
        (MemoryError(), "out of memory; close other programs or take a smaller model"),
        (MemoryError("4 GB"), "out of memory (4 GB); close other programs or take a smaller model"),
        (FormatError("a\x1b[2J\x9bz"), "a�[2J�z"),
    ],
)
def test_expected_errors_are_a_sentence(
    rwkv: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    monkeypatch.setattr("rwkv_cli.quant.Checkpoint.__init__", lambda *_: (_ for _ in ()).throw(error))
    result = rwkv("info", __file__)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"Error: {says}\n")


def test_a_bug_keeps_its_traceback(rwkv: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_cli.quant.Checkpoint.__init__", lambda *_: (_ for _ in ()).throw(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        rwkv("info", __file__)


def test_bytes_and_terminals_of_other_encodings_stop_nothing(byte_model: Path) -> None:
    """Input that is not UTF-8, a script that the terminal lacks."""
    done = subprocess.run(
        [sys.executable, "-m", "rwkv_cli", "chat", "-n", "40", "--top-p", "1"],
        input=b"\xff\xe4\n", capture_output=True, check=False,
        env={**os.environ, "RWKV_MODEL": str(byte_model), "PYTHONIOENCODING": "ascii:strict"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"?" in done.stdout
    assert done.stdout.isascii()


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_not_steered(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[31m\x07\x00\tb\r\nc\x9b2J\x7f\rd\u202eé"
    for stream, want in ((io.StringIO(), text), (Screen(), "a�[31m��\tb\nc�2J�d�é")):
        monkeypatch.setattr(sys, "stdout", stream)
        terminal.write(text)
        assert stream.getvalue() == want


def test_columns_are_aligned() -> None:
    rows = [("a", "bb", "1"), ("ccc", "\x1b", "100")]
    assert terminal.columns(rows, right=[2]) == "a    bb    1\nccc  �   100"


def test_progress_names_any_file(rwkv: Run, byte_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar stands on a terminal, and the name is neither a format string nor markup."""
    import rich.console

    screen = Screen()
    console = rich.console.Console
    monkeypatch.setattr(rich.console, "Console", lambda **_: console(file=screen, force_terminal=True, width=150))
    (tmp_path / "x{0}[b].txt").write_bytes(b"abc" * 50)
    result = rwkv("ppl", tmp_path / "x{0}[b].txt", "-m", byte_model)
    assert result.exit_code == 0, result.output
    assert "x{0}[b].txt" in screen.getvalue()
    assert "100 %" in screen.getvalue()


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_info_says_what_a_file_holds(rwkv: Run, converted: Any, version: str) -> None:
    path = converted(version)
    facts = json.loads(rwkv("info", path, "--json", "--tensors").stdout)
    tensors = facts.pop("tensors")
    assert facts == json.loads(rwkv("info", path, "--json").stdout)
    assert (facts["path"], facts["bytes"], facts["quantization"]) == (str(path), path.stat().st_size, "int8")
    assert (facts["tokenizer"], facts["template"], facts["source"]) == ("none", "plain", path.with_suffix(".pth").name)
    assert (facts["config"]["version"], facts["config"]["vocab"], facts["config"]["layers"]) == (version, 300, 3)
    stored = load_file(path)
    assert sum(row["bytes"] for row in tensors) == sum(array.nbytes for array in stored.values())
    assert 8 < facts["bits_per_weight"] < 40
    assert {row["layout"] for row in tensors} <= {"rows", "tile", "columns", "vector", "float"}
    table = rwkv("info", path, "--tensors").stdout
    assert f"RWKV-{version}\n" in table
    assert all(row["name"] in table for row in tensors)
    assert "emb.weight" not in rwkv("info", path).stdout


def test_info_reads_floats_too(rwkv: Run, converted: Any) -> None:
    facts = json.loads(rwkv("info", converted("7", "none"), "--json").stdout)
    assert (facts["quantization"], facts["bits_per_weight"]) == ("none", 32.0)
    assert facts["parameters"] == json.loads(rwkv("info", converted("7"), "--json").stdout)["parameters"]


@pytest.mark.parametrize(
    ("change", "drop", "code"),
    [
        ({"config": "[]"}, "", 1),
        ({"config": "{"}, "", 1),
        ({"config": '{"ranks": 5}'}, "", 0),
        ({"template": "5"}, "", 1),
        ({"template": '"\\u001b[2J"'}, "", 0),
        ({"tensors": '{"emb.weight": 5}'}, "", 1),
        ({"tensors": "[]"}, "", 1),
        ({"format": "other"}, "", 1),
        ({"format_version": "x"}, "", 1),
        ({"format_version": "99"}, "", 1),
        ({}, "emb.weight", 1),
        ({}, "blocks.0.ln1.weight", 1),
    ],
)
def test_info_on_a_damaged_file(
    rwkv: Run, byte_model: Path, tmp_path: Path, change: dict[str, str], drop: str, code: int
) -> None:
    from safetensors import safe_open

    with safe_open(byte_model, "np") as file:
        metadata = file.metadata()
    arrays = load_file(byte_model)
    arrays.pop(drop, None)
    save_file(arrays, tmp_path / "m", metadata | change)
    result = rwkv("info", tmp_path / "m")
    assert result.exit_code == code
    if code:
        assert result.stderr.startswith(f"Error: {tmp_path / 'm'}: ")
        assert result.stderr.count("\n") == 1
    assert "\x1b" not in result.output


@pytest.mark.parametrize("content", [None, b"", b"\x80\x02", b"PK\x03\x04junk", b"\x00" * 100, b"hello\n" * 9])
def test_info_on_another_file(rwkv: Run, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "m").write_bytes(content)
    result = rwkv("info", tmp_path / "m")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert str(tmp_path / "m") in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full; Linux has it")
@pytest.mark.parametrize("command", ["--help", "chat --help", "info"])
def test_a_full_disk_is_a_sentence(command: str) -> None:
    script = f'"{sys.executable}" -m rwkv_cli {command} > /dev/full'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Error: No space left on device"
    assert "Traceback" not in done.stderr


def test_a_message_is_not_endless(rwkv: Run) -> None:
    result = rwkv("info", "a" * 100_000)
    assert result.exit_code == 1
    assert 1000 < len(result.stderr) < 2000


def test_a_wrong_model_in_the_environment_is_named(rwkv: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_MODEL", "gone.safetensors")
    for command in (["generate", "a"], ["info"], ["chat"]):
        result = rwkv(*command)
        assert result.exit_code == 1
        assert "gone.safetensors: No such file or directory, and no model has this name" in result.stderr
        assert result.stderr.endswith("; $RWKV_MODEL names it\n")


@pytest.mark.parametrize("megabytes", [60, 200, 390])
def test_a_limit_of_memory_gives_a_sentence(byte_model: Path, megabytes: int) -> None:
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    command = [sys.executable, "-m", "rwkv_cli", "generate", "a", "-m", str(byte_model), "-n", "1"]
    limit = megabytes << 20

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, timeout=100)
    says = f"this shell allows {megabytes} MB: raise its limit with `ulimit -v` or take a smaller model"
    assert (done.returncode, done.stderr) == (1, f"Error: out of memory; {says}\n")


@pytest.mark.parametrize("version", ["7a", "8-rc00"])
def test_every_command_runs_a_model_with_tables(rwkv: Run, converted: Any, tmp_path: Path, version: str) -> None:
    model = converted(version, vocab=256)
    common = ("-m", model, "--seed", 1, "--ignore-eos")
    whole = json.loads(rwkv("generate", "ab", *common, "-n", 9, "--json").stdout)
    assert whole["tokens"] == 9
    (tmp_path / "in.jsonl").write_text('{"prompt": "ab", "max_tokens": 9}\n{"prompt": "b", "max_tokens": 3}\n')
    answers = map(json.loads, rwkv("generate", "--batch", tmp_path / "in.jsonl", *common).stdout.splitlines())
    assert {answer["id"]: answer["text"] for answer in answers}[1] == whole["text"]
    kept = rwkv("generate", "ab", *common, "-n", 4, "--save-state", tmp_path / "state")
    rest = rwkv("generate", "", "-m", model, "--ignore-eos", "-n", 5, "--load-state", tmp_path / "state")
    assert (kept.exit_code, rest.exit_code) == (0, 0), (kept.stderr, rest.stderr)
    (tmp_path / "text").write_text("some text")
    assert json.loads(rwkv("ppl", tmp_path / "text", "-m", model, "--json").stdout)["nll"] > 0
    assert rwkv("chat", "hi", "-m", model, "--max-tokens", 3).exit_code == 0
    figures = json.loads(rwkv("bench", "-m", model, "-p", 4, "-n", 2, "-r", 1, "--json").stdout)
    assert figures["version"] == version


def test_messages_have_no_numbers_of_errors_and_commands_can_be_pasted(
    rwkv: Callable[..., Result], byte_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwkv_cli.engine import sessions

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    odd = tmp_path / "my model; rm -rf.safetensors"
    shutil.copy(byte_model.with_suffix(".pth"), odd)
    said = rwkv("info", odd).stderr
    assert shlex.split(said.rpartition("convert it first: ")[2]) == ["rwkv", "convert", str(odd)]
    monkeypatch.setattr(sessions, "remove", lambda _: (tmp_path / "none").stat())
    for result in (rwkv("sessions", "rm", "a"), rwkv("generate", "a", "-m", tmp_path / "none"), rwkv("ppl", "none")):
        assert "No such file" in result.stderr
        assert "Errno" not in result.stderr
    monkeypatch.chdir(tmp_path)
    shutil.copy(byte_model.with_suffix(".pth"), "m.pth")
    *_, wrote, next_one = rwkv("convert", "m.pth").stderr.splitlines()
    assert wrote == "Wrote m.int8.safetensors"
    assert shlex.split(next_one.partition(": ")[2]) == ["rwkv", "chat", "-m", "m.int8.safetensors"]
