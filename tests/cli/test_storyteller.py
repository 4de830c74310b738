"""The bundled model: there, small, converted once, and able to tell a story."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from click.testing import Result

from rwkv_cli.engine import storyteller
from rwkv_cli.engine.conversion import Conversion

Run = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storyteller, "cache_folder", lambda: tmp_path)
    return tmp_path


def test_it_is_small_and_plain() -> None:
    assert storyteller.SOURCE.stat().st_size <= 12_000_000
    conversion = Conversion.of(storyteller.SOURCE, "int8")
    assert (conversion.config.version, conversion.config.head_size) == ("7", 64)
    assert 3e6 < conversion.contents.weights < 6e6
    metadata = conversion.contents.metadata
    assert (metadata["tokenizer"], metadata["template"]) == ("json", "plain")


def test_it_is_converted_once(cache: Path) -> None:
    done: list[int] = []
    kernels: list[object] = []
    path = storyteller.storyteller(lambda *_: nullcontext(done.append), kernels.extend)
    assert kernels
    assert sum(done) == Conversion.of(storyteller.SOURCE, "int8").contents.source_bytes
    before = path.stat().st_mtime_ns
    assert storyteller.storyteller(lambda *_: pytest.fail("converted again"), pytest.fail) == path
    assert path.stat().st_mtime_ns == before
    assert {file for file in cache.rglob("*") if file.is_file()} == {path, path.with_suffix(".sha256")}


@pytest.mark.parametrize("size", [0, 40_000])
def test_a_damaged_one_is_converted_again(size: int) -> None:
    path = storyteller.storyteller(lambda *_: nullcontext(lambda _: None), list)
    whole = path.read_bytes()
    path.write_bytes(whole[:size] + bytes(len(whole) - size) if size else b"")
    assert storyteller.storyteller(lambda *_: nullcontext(lambda _: None), list) == path
    assert path.read_bytes() == whole


def test_commands_take_it_where_no_model_is_named(rwkv: Run, monkeypatch: pytest.MonkeyPatch, byte_model: Path) -> None:
    result = rwkv("generate", "Once upon a time", "--temperature", 0, "-n", 40)
    assert result.exit_code == 0
    assert "bundled storyteller" in result.stderr
    assert "-m or $RWKV_MODEL" in result.stderr
    assert re.match(r", there was a [a-z ]+", result.stdout)
    monkeypatch.setenv("RWKV_MODEL", str(byte_model))
    assert rwkv("generate", "Once", "-n", 3).stderr == ""


def test_it_answers_and_ends(rwkv: Run) -> None:
    result = rwkv("chat", "--seed", 1, input="Tell me a story about a brave little dog.\nThanks!\n")
    story, _, thanks = result.stdout.rstrip("\n").rpartition("\n")
    assert "dog" in story
    assert 40 < len(story.split()) < 400
    assert 2 < len(thanks.split()) < 20


def test_it_has_learnt_its_language(rwkv: Run) -> None:
    result = rwkv("ppl", ROOT / "docs" / "story.txt")
    bits = re.search(r"bits per byte +([0-9.]+)", result.stdout)
    assert bits is not None
    assert float(bits[1]) < 1.1
