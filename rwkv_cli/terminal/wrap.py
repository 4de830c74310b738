"""Text in pieces, broken between words where a terminal would break it anywhere."""

import os
import shutil
import sys

from rwkv_cli.terminal.output import dim, harmless


class Wrapped:
    """A text that is written to a terminal in pieces. A word that is too long for its line moves to the next one."""

    def __init__(self) -> None:
        self._column = 0
        self._word = ""

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
            self._column, self._word = 0, ""
            return character
        width = cell_len(character) if character != "\t" else 8 - self._column % 8
        moved = ""
        if self._column + width >= shutil.get_terminal_size().columns:
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
