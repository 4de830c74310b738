"""What is printed: aligned columns, text that cannot steer the terminal, progress on standard error."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

# control characters that are not blanks: a model or a file may hold any bytes, an escape sequence among them;
# a carriage return, which would overwrite the line, is left out, since it comes with a line break anyway
_CONTROL: dict[int, str | None] = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
_CONTROL[ord("\r")] = None


def harmless(text: str) -> str:
    """The text without what could steer a terminal."""
    return text.translate(_CONTROL)


def columns(rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> str:
    """Rows as lines, each column as wide as its widest cell; columns numbered in `right` end together."""
    cells = [[harmless(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def write(text: str) -> None:
    """A piece of a model's text to standard output, at once; as it is into a pipe, harmless on a terminal."""
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


@contextmanager
def progress_bar(*parts: "ProgressColumn | str") -> Iterator["Progress"]:
    """A progress bar on standard error, gone when done; nothing where that is not a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(*parts, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def note(text: str) -> None:
    """A line beside the result: to standard error."""
    click.echo(text, err=True)
