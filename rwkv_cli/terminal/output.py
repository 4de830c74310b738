"""What is printed: aligned columns, text that cannot steer the terminal, progress on standard error."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
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


def write(text: str, faint: bool = False) -> None:
    """A piece of a model's text to standard output, at once; as it is into a pipe, harmless on a terminal."""
    if sys.stdout.isatty():
        text = dim(harmless(text)) if faint else harmless(text)
    sys.stdout.write(text)
    sys.stdout.flush()


def dim(text: str) -> str:
    """The text in faint letters, for a terminal; as it is where NO_COLOR is set or no terminal can do it."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return text if plain else f"\x1b[2m{text}\x1b[22m"


@contextmanager
def progress_bar(*parts: "ProgressColumn | str") -> Iterator["Progress"]:
    """A progress bar on standard error, gone when done; nothing where that is not a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(*parts, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


@contextmanager
def reading_bar(tokens: int) -> Iterator[Callable[[int], None]]:
    """What to call with the number of a prompt's `tokens` read so far, each time that there are more of them.

    A bar on standard error appears once all of them look to take more than a second, and goes when they are read.
    """
    start = time.perf_counter()
    with ExitStack() as stack:
        update: Callable[..., None] | None = None

        def show(read: int) -> None:
            nonlocal update
            if read >= tokens:
                stack.close()
                return
            seconds = time.perf_counter() - start
            left = seconds / read * (tokens - read)
            if update is None and seconds + left > 1:
                from rich.progress import BarColumn, MofNCompleteColumn

                parts = "Reading", BarColumn(), MofNCompleteColumn(), "{task.description}"
                bar = stack.enter_context(progress_bar(*parts))
                update = partial(bar.update, bar.add_task("", total=tokens))
            if update is not None:
                update(completed=read, description=f"tokens  {read / seconds:.0f} tok/s  {left:.0f} s left")

        yield show


@contextmanager
def loading_bar(path: Path) -> Iterator[Callable[[int], None]]:
    """What to call with how many bytes of a file's weights are loaded. A bar on standard error, as `reading_bar`'s."""
    start, size = time.perf_counter(), path.stat().st_size if path.is_file() else 0
    with ExitStack() as stack:
        update: Callable[..., None] | None = None

        def show(loaded: int) -> None:
            nonlocal update
            seconds = time.perf_counter() - start
            if update is None and seconds / max(loaded, 1) * size > 1:
                from rich.progress import BarColumn, DownloadColumn, TransferSpeedColumn

                bar = stack.enter_context(progress_bar("Loading", BarColumn(), DownloadColumn(), TransferSpeedColumn()))
                update = partial(bar.update, bar.add_task("", total=size))
            if update is not None:
                update(completed=loaded)

        yield show


def note(text: str, faint: bool = False) -> None:
    """A line beside the result: to standard error."""
    text = harmless(text)
    click.echo(dim(text) if faint else text, err=True)
