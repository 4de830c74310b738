"""Output: aligned columns, text that cannot steer the terminal, progress on standard error."""

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from rwkv_cli.engine.spread import Step

# A model or a file may hold any bytes, an escape sequence among them. Control characters that are not blanks are
# replaced. A carriage return would overwrite the line. It is left out, as it comes with a line break anyway.
# So are the characters that turn the direction of writing, since they can show a name as another one.
_TURNING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROL: dict[int, str | None] = {
    code: "�" for code in (*range(32), *range(127, 160), *_TURNING) if chr(code) not in "\t\n"
}
_CONTROL[ord("\r")] = None
_PATIENCE = 0.7
"""Seconds without a word that a person is asked to bear."""
_BREAKS = {ord(char): "�" for char in "\r\n\t\u2028\u2029"}


def harmless(text: str) -> str:
    """Return the text without the characters that could steer a terminal."""
    return text.translate(_CONTROL)


def one_line(text: object) -> str:
    """Return a name, or a sentence with names in it, on one line and without what could steer a terminal."""
    return harmless(str(text).translate(_BREAKS))


def columns(rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> str:
    """Write rows as lines, each column as wide on a terminal as its widest cell. `right` numbers the right-aligned."""
    from rich.cells import cell_len

    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        blanks = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        padded = [b + cell if i in right else cell + b for i, (cell, b) in enumerate(zip(row, blanks, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def counted(number: int, thing: str) -> str:
    """Say how many there are of something: "1 turn", "2 turns"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def crew_text(step: "Step[Any]") -> str:
    """Say behind a rate how many workers there are, and how many were lost."""
    lost = f", {step.lost} lost" if step.lost else ""
    return f"  {counted(step.workers, 'worker')}{lost}"


def write(text: str, faint: bool = False) -> None:
    """Write a piece of a model's text to standard output, at once. A pipe gets it unchanged, a terminal harmless."""
    if sys.stdout.isatty():
        text = dim(harmless(text)) if faint else harmless(text)
    sys.stdout.write(text)
    sys.stdout.flush()


def dim(text: str) -> str:
    """Return the text in faint letters, or unchanged where NO_COLOR is set or the terminal lacks them."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return text if plain else f"\x1b[2m{text}\x1b[22m"


def shows_bars() -> bool:
    """Return whether standard error is a terminal on which lines can be drawn anew."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


@contextmanager
def progress_bar(*parts: "ProgressColumn | str") -> Iterator["Progress"]:
    """Show a progress bar on standard error, gone when done. Nothing shows where that is not a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(*parts, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


@contextmanager
def reading_bar(tokens: int) -> Iterator[Callable[[int], None]]:
    """Show how far a prompt is read. The function to call takes the number of its `tokens` read so far.

    A bar appears on standard error after a part of a second, even if nothing is read by then. It goes at the end.
    """
    from rich.progress import BarColumn, MofNCompleteColumn

    start, done = time.perf_counter(), threading.Event()
    lock = threading.Lock()
    parts = "Reading", BarColumn(), MofNCompleteColumn(), "tokens  {task.description}"
    with ExitStack() as stack:
        update: Callable[..., None] | None = None

        def begin() -> None:
            """Show the bar, unless all is read. A timer's thread calls this."""
            nonlocal update
            with lock:
                if not done.is_set():
                    bar = stack.enter_context(progress_bar(*parts))
                    update = partial(bar.update, bar.add_task("", total=tokens))

        def end() -> None:
            timer.cancel()
            with lock:
                done.set()

        def show(read: int) -> None:
            if read >= tokens:
                end()
                stack.close()
            elif update is not None:
                seconds = time.perf_counter() - start
                left = seconds / read * (tokens - read)
                update(completed=read, description=f"{read / seconds:.0f} tok/s  {left:.0f} s left")

        timer = threading.Timer(_PATIENCE, begin)
        timer.daemon = True
        if shows_bars():
            timer.start()
        try:
            yield show
        finally:
            end()


@contextmanager
def loading_bar(path: Path) -> Iterator[Callable[[int], None]]:
    """Show how far a model is loaded, as `reading_bar` does. The function to call takes the bytes loaded so far."""
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


def folded(text: str, width: int) -> str:
    """Break lines that are wider than `width` between words. What follows stands under the line's second column.

    A line without columns goes on at its beginning. The text is harmless.
    """
    return "\n".join(_folded(line, width) if len(line) * 2 >= width else line for line in text.split("\n"))


def _folded(line: str, width: int) -> str:
    """Break one line."""
    from rich.cells import cell_len

    columns = re.match(r"\S.*?\s{2,}(?=\S)", line)
    indent = cell_len(columns[0]) if columns and 3 * cell_len(columns[0]) < 2 * width else 0
    lines, column = [""], 0
    for word in re.findall(r"\s*\S+|\s+$", line):
        size = cell_len(word)
        if column + size >= width and lines[-1].strip():
            word = " " * indent + word.lstrip()
            lines.append("")
            column, size = 0, cell_len(word)
        lines[-1] += word
        column += size
    return "\n".join(lines)


def note(text: str, faint: bool = False) -> None:
    """Write a line beside the result, to standard error. A terminal gets it broken between words."""
    text = harmless(text)
    if shows_bars():
        text = folded(text, shutil.get_terminal_size().columns)
    click.echo(dim(text) if faint else text, err=True)
