"""Text in pieces, broken between words where a terminal would break it anywhere."""

import os
import shutil
import sys
from collections.abc import Callable

from rwkv_cli.terminal.output import dim, harmless, write


class Wrapped:
    """A text that is written to a terminal in pieces. A word that is too long for its line moves to the next one."""

    def __init__(self) -> None:
        self._column = 0
        self._word = ""
        self._width = shutil.get_terminal_size().columns
        self._lost = False
        """True after the terminal got another width, which may have moved the cursor to any column."""

    def write(self, text: str, faint: bool = False) -> None:
        """Write the next piece. The last column stays free, since a cursor there is in no certain place."""
        text = harmless(text)
        if os.environ.get("TERM", "dumb") != "dumb":
            text = "".join(map(self._placed, text))
        sys.stdout.write(dim(text) if faint else text)
        sys.stdout.flush()

    def _placed(self, character: str) -> str:
        """Return a character with the line break that has to come before it."""
        from rich.cells import cell_len

        if character == "\n":
            self._column, self._word, self._lost = 0, "", False
            return character
        width = cell_len(character) if character != "\t" else 8 - self._column % 8
        now = shutil.get_terminal_size().columns
        if now != self._width:
            self._width, self._lost = now, self._column > 0
        if self._lost:
            if not character.isspace() and width < 2:
                return character
            # a new line, where the column is known again
            self._column, self._word, self._lost = 0, "", False
            if character.isspace():
                return "\n"
            self._column = width
            return "\n" + character
        moved = ""
        if self._column + width >= self._width:
            size = cell_len(self._word)
            if character.isspace() or size in (0, self._column):
                moved = "\n"  # the break is between words, or in a word that no line holds
                self._word = ""
            else:
                moved = "\b" * size + "\x1b[K\n" + self._word
            self._column = cell_len(self._word)
            if character.isspace():
                return moved
        self._column += width
        # Scripts that are not written in words break anywhere.
        self._word = "" if character.isspace() or width > 1 else self._word + character
        return moved + character


def answer_writer() -> Callable[..., None]:
    """Return a function that writes a model's text in pieces: broken between words on a terminal, else as it is."""
    return Wrapped().write if sys.stdout.isatty() else write
