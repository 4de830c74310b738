"""Names from files steer nothing, wherever they are printed."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from click.testing import Result

from rwkv_cli.terminal.output import columns, folded, harmless, one_line

Run = Callable[..., Result]
EVIL = "a\x1b[2J\nb\u202egpj\u2066\x9b"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_what_steers_a_terminal_is_replaced() -> None:
    assert harmless("a\x1b[2J\u202e\u2069\r\n\tb\x9b") == "a�[2J��\n\tb�"
    assert harmless("שלום\u200f é 你好 👩‍👧") == "שלום\u200f é 你好 👩‍👧"
    assert one_line("a\nb\r\n\tc\u2028") == "a�b���c�"
    assert columns([("a\nb", 1), ("c", Path("d\u202e"))]) == "a�b  1\nc    d�"


def test_columns_are_as_wide_as_a_terminal_shows_them() -> None:
    assert columns([("日記", 1), ("abc", 22)], right=[1]) == "日記   1\nabc   22"


@pytest.fixture
def evil(byte_model: Path, tmp_path: Path) -> Path:
    """A checkpoint and a converted model with such a name."""
    shutil.copy(byte_model, tmp_path / f"{EVIL}.safetensors")
    shutil.copy(byte_model.with_suffix(".pth"), tmp_path / f"{EVIL}.pth")
    (tmp_path / EVIL).write_text("some text")
    return tmp_path / EVIL


def clean(result: Result, lines: int | None = None) -> None:
    assert not STEERS.search(result.output)
    assert "a�[2J�b�gpj��" in result.output or ascii(EVIL) in result.output
    assert lines is None or len(result.stderr.strip().splitlines()) == lines


def test_names_of_files_steer_nothing(rwkv: Run, evil: Path, tmp_path: Path) -> None:
    model, source, out = f"{evil}.safetensors", f"{evil}.pth", tmp_path / f"{EVIL}.out"
    # a note on the chat template, and the lines with the name
    clean(rwkv("convert", source, out, "--dry-run"), 2)
    clean(rwkv("convert", source, out), 3)
    clean(rwkv("convert", source, out), 1)  # it exists
    clean(rwkv("info", model))
    clean(rwkv("info", out, "--tensors"))
    clean(rwkv("ppl", evil, "-m", model))
    clean(rwkv("ppl", evil, "-m", model, "--plot", f"{evil}.xyz"))
    clean(rwkv("ppl", evil, "-m", f"{evil}.none"), 1)
    clean(rwkv("generate", "a", "-m", evil), 1)
    one = EVIL.replace("\n", "\ufffd")  # a line break would begin a turn, whose answer may be anything
    clean(rwkv("chat", "-m", model, input=f"/copy {tmp_path}/{one}.md\n/load {one}\n"))
    clean(rwkv("generate", "a", "-m", model, "--save-state", evil), 1)
    clean(rwkv("bench", model, "--device", EVIL))
    facts = json.loads(rwkv("ppl", evil, "-m", model, "--json").stdout)
    assert facts["file"] == str(evil)


def test_names_in_files_steer_nothing(rwkv: Run, tmp_path: Path) -> None:
    weights = tiny.weights("7", vocab=256)
    source = tiny.write_pth(tmp_path / "m.pth", weights | {EVIL: weights["head.weight"]}, "F32")
    clean(rwkv("convert", source), 1)


def test_long_lines_are_broken_between_words() -> None:
    text = "a note of some words that is too long\nshort"
    assert folded(text, 20) == "a note of some\nwords that is too\nlong\nshort"
    assert folded("x" * 30, 20) == "x" * 30
    assert folded("你好 你好 你好", 11) == "你好 你好\n你好"


def test_a_table_goes_on_under_its_second_column() -> None:
    table = columns([("/set NAME", "show a setting, or change it"), ("/exit", "leave")])
    assert folded(table, 30) == ("/set NAME  show a setting, or\n           change it\n/exit      leave")
