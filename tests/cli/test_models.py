"""Models by name: `rwkv models`, and what -m takes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner, Result

from rwkv_cli.main import cli
from rwkv_cli.quant import Checkpoint

Run = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder, and a home for sessions."""
    monkeypatch.setenv("RWKV_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def test_models_lists_what_each_is(rwkv: Run, folder: Path, byte_model: Path) -> None:
    assert "No models in" in rwkv("models").stderr
    (folder / "seven.int8.safetensors").symlink_to(byte_model)
    (folder / "broken.safetensors").write_bytes(b"x" * 20)
    result = rwkv("models")
    head, line = result.stdout.splitlines()
    assert head.split() == ["name", "version", "MB", "bits", "template", "last", "used"]
    assert line.split()[:2] == ["seven.int8", "RWKV-7"]
    assert "broken.safetensors" in result.stderr
    assert result.exit_code == 0
    (folder / "broken.safetensors").unlink()
    row = json.loads(rwkv("models", "--json").stdout)
    assert row["name"], row["version"] == ("seven.int8", "7")
    assert row["bytes"] == byte_model.stat().st_size
    assert 8 < row["bits_per_weight"] < 20
    assert row["template"] == "plain"
    assert row["last_used"] is None
    assert rwkv("generate", "a", "-n", 1, "-m", "seven").exit_code == 0
    assert json.loads(rwkv("models", "--json").stdout)["last_used"] > "2026"


def test_every_command_takes_a_name(rwkv: Run, folder: Path, byte_model: Path, tmp_path: Path) -> None:
    shutil.copy(byte_model, folder / "seven.int8.safetensors")
    (tmp_path / "text").write_text("Once")
    (tmp_path / "messages").write_text('[{"role": "user", "content": "Hello"}]')
    for command in (
        ["info", "seven"],
        ["tokenize", "a", "-m", "seven"],
        ["prompt", tmp_path / "messages", "-m", "seven"],
        ["ppl", tmp_path / "text", "-m", "seven", "--compare", "sev"],
        ["chat", "-m", "seven", "-n", 2, "--session", "diary", "Hello"],
    ):
        result = rwkv(*command)
        assert result.exit_code == 0, result.output
    assert rwkv("sessions", "list").stdout.splitlines()[1].endswith("seven.int8")
    assert rwkv("chat", "--session", "diary", "-n", 2, "again").exit_code == 0


def test_a_session_finds_its_model_in_the_folder(rwkv: Run, folder: Path, byte_model: Path, tmp_path: Path) -> None:
    """A converted file may be moved there after a chat with it."""
    path = tmp_path / "moved.safetensors"
    shutil.copy(byte_model, path)
    assert rwkv("chat", "-m", path, "-n", 2, "--session", "diary", "Hello").exit_code == 0
    transcript = tmp_path / "data" / "rwkv" / "sessions" / "diary" / "transcript.json"
    transcript.write_text(transcript.read_text().replace(str(path), str(tmp_path / "gone" / path.name)))
    path.rename(folder / path.name)
    assert rwkv("chat", "-n", 2, "--session", "diary", "again").exit_code == 0


@pytest.mark.parametrize("write", [tiny.write_pth, tiny.write_safetensors])
def test_a_checkpoint_is_converted_once(rwkv: Run, folder: Path, tmp_path: Path, write: Callable[..., Path]) -> None:
    source = write(tmp_path / "new.pth", tiny.weights("7", layers=1, vocab=256), "F32")
    first = rwkv("generate", "a", "-n", 3, "--seed", 1, "-m", source)
    assert first.exit_code == 0, first.output
    assert f"{source} was converted: this is the model new.int8." in first.stderr
    model = folder / "new.int8.safetensors"
    made = model.stat().st_mtime_ns
    for word in (source, "new"):
        assert rwkv("generate", "a", "-n", 3, "--seed", 1, "-m", word).stdout == first.stdout
    assert model.stat().st_mtime_ns == made
    assert Checkpoint(model).metadata("source", str) == "new.pth"

    write(source, tiny.weights("7", layers=2, vocab=256), "F32")
    assert rwkv("generate", "a", "-n", 3, "-m", source).exit_code == 0
    assert Checkpoint(model).metadata("config", dict)["layers"] == 2
    assert sorted(path.name for path in folder.iterdir()) == ["new.int8.json", "new.int8.safetensors"]


def test_a_folder_is_converted_once(rwkv: Run, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "hub"
    source.mkdir()
    tiny.write_pth(source / "pytorch_model.bin", tiny.weights("7", layers=1, vocab=256))
    for _ in range(2):
        assert rwkv("generate", "a", "-n", 1, "-m", source).exit_code == 0
    assert [path.name for path in folder.glob("*.safetensors")] == ["hub.int8.safetensors"]


def test_what_is_no_model_leaves_nothing(rwkv: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear friend")
    tiny.refused(rwkv("generate", "a", "-m", tmp_path / "letter.txt"), "letter.txt: neither a torch .pth nor")
    tiny.write_pth(tmp_path / "odd.pth", {"weight": tiny.weights("7")["emb.weight"]})
    tiny.refused(rwkv("generate", "a", "-m", tmp_path / "odd.pth"), "odd.pth")
    tiny.refused(rwkv("generate", "a", "-m", "odd"), "odd: No such file or directory, and no model")
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_made_is_named(rwkv: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RWKV_MODELS", str(tmp_path / "file" / "models"))
    source = tiny.write_pth(tmp_path / "new.pth", tiny.weights("7", layers=1, vocab=256))
    tiny.refused(rwkv("generate", "a", "-m", source), f"{tmp_path / 'file'}.*: Not a directory")
    assert rwkv("models").exit_code == 0


def test_the_bundled_model_has_a_name(rwkv: Run, folder: Path) -> None:
    assert rwkv("tokenize", "Once", "-m", "storyteller").exit_code == 0
    assert rwkv("info", "storyteller").stdout == rwkv("info").stdout
    assert not list(folder.iterdir())


def test_path_and_rm(rwkv: Run, folder: Path) -> None:
    for name in ("a.int8", "ab.int8"):
        (folder / f"{name}.safetensors").touch()
    (folder / "a.int8.json").touch()
    assert rwkv("models", "path").stdout == f"{folder}\n"
    assert rwkv("models", "path", "ab.int8").stdout == f"{folder / 'ab.int8.safetensors'}\n"
    result = rwkv("models", "rm", "a", "a.int8")
    assert (result.exit_code, result.stderr.splitlines()[0]) == (1, "Removed a.int8.")
    assert "no model is called a (" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["ab.int8.safetensors"]


def test_the_shell_completes_names_and_paths(folder: Path) -> None:
    for name in ("a.int8", "ab.int8", "c"):
        (folder / f"{name}.safetensors").touch()
    for words, count, expected in (
        ("rwkv chat -m a", 3, ["plain,a.int8", "plain,ab.int8", "file,a"]),
        ("rwkv info ab", 2, ["plain,ab.int8", "file,ab"]),
        ("rwkv models rm c", 3, ["plain,c"]),
    ):
        env = {"_RWKV_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(count)}
        assert CliRunner().invoke(cli, [], prog_name="rwkv", env=env).stdout.splitlines() == expected


def test_a_file_in_the_folders_place_is_named(rwkv: Run, folder: Path, byte_model: Path) -> None:
    folder.rmdir()
    folder.write_text("notes")
    result = rwkv("generate", "a", "-m", byte_model.with_suffix(".pth"))
    tiny.refused(result, f"{folder}: is a file; name a folder for models with", "RWKV_MODELS")
    assert folder.read_text() == "notes"
