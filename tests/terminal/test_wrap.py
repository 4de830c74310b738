"""Words that stay whole at the edge of a terminal: the screen is what the text, broken between words, would be."""

import io
import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_cli.terminal import wrap

WIDTH = 12


def screen(output: str) -> list[str]:
    """Return the screen of a terminal of this width. It moves back for \\b and clears to the end of the line.

    It wraps nothing itself, as no line gets that far.
    """
    lines, column = [[" "] * WIDTH], 0
    for character in output.replace("\x1b[K", "\x00"):
        if character == "\n":
            lines.append([" "] * WIDTH)
            column = 0
        elif character == "\b":
            column -= 1
        elif character == "\x00":
            lines[-1][column:] = [" "] * (WIDTH - column)
        else:
            assert column < WIDTH - 1, "the last column stays free"
            lines[-1][column] = character
            column += 1
        assert column >= 0
    return ["".join(line).rstrip() for line in lines]


@contextmanager
def terminal(width: Callable[[], int]) -> Iterator[io.StringIO]:
    """What is written to a terminal of this width in the block."""
    with pytest.MonkeyPatch.context() as patch:
        out = io.StringIO()
        patch.setattr(wrap.sys, "stdout", out)
        patch.setattr(wrap.shutil, "get_terminal_size", lambda: os.terminal_size((width(), 24)))
        patch.setenv("TERM", "xterm")
        yield out


def shown(pieces: list[str]) -> str:
    with terminal(lambda: WIDTH) as out:
        writer = wrap.Wrapped()
        for piece in pieces:
            writer.write(piece)
        return out.getvalue()


@given(st.lists(st.text("ab", min_size=1, max_size=WIDTH - 2), max_size=12), st.integers(1, 5))
def test_words_stay_whole(words: list[str], size: int) -> None:
    text = " ".join(words)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert screen(shown(pieces)) == (textwrap.wrap(text, WIDTH - 1) or [""])


@given(st.text("ab \n"), st.integers(1, 5))
def test_nothing_is_lost(text: str, size: int) -> None:
    lines = screen(shown([text[i : i + size] for i in range(0, len(text), size)]))
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_long_words_and_wide_letters() -> None:
    assert screen(shown(["a" * 25])) == ["a" * 11, "a" * 11, "aaa"]
    assert shown(["你好" * 4]) == "你好你好你\n好你好"
    assert shown(["ab ", "\x1b[2J"]) == "ab �[2J"


def test_a_dumb_terminal_gets_the_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "dumb")
    wrap.Wrapped().write("a b " * 200)
    assert capsys.readouterr().out == "a b " * 200


@given(st.lists(st.text("ab", min_size=1, max_size=6), min_size=6, max_size=30), st.integers(1, 40), st.integers(9, 30))
def test_after_a_resize_later_lines_are_whole(words: list[str], at: int, width: int) -> None:
    """Where the cursor is after a resize is not known, so the first blank ends that line. Later ones are as ever."""
    text = " ".join(words)
    now = WIDTH
    with terminal(lambda: now) as out:
        writer = wrap.Wrapped()
        writer.write(text[:at])
        before = out.tell()
        now = width
        writer.write(text[at:])
    after = out.getvalue()[before:]
    if width == WIDTH:
        return
    if out.getvalue()[:before].endswith("\n"):  # the column is known
        assert screen_of(after, width) == (textwrap.wrap(text[at:], width - 1) or [""])
        return
    first, _, rest = after.partition("\n")
    head, _, left = text[at:].partition(" ")
    assert first == head, "nothing moves on the line whose columns are unknown"
    assert screen_of(rest, width) == (textwrap.wrap(left, width - 1) or [""])


def screen_of(output: str, width: int) -> list[str]:
    """Return the screen of a terminal of another width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "WIDTH", width)
        return screen(output)
