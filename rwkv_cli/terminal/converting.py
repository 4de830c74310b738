"""The bars that a person sees while a checkpoint is downloaded and converted."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rwkv_cli.engine.bars import OF_TOKENS, Bar
from rwkv_cli.terminal.output import progress_bar


def byte_bar(label: str) -> Bar:
    """A progress bar for work with a label: a function of how many bytes there are to do."""
    return partial(converting_bar, label)


@contextmanager
def converting_bar(label: str, size: int) -> Iterator[Callable[[int], object]]:
    """A progress bar over `size` bytes, or over tokens. Its block gets a function to call with how many are just done.

    A signal that would end the process becomes an exception here, so that no half file stays behind.
    """
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TimeRemainingColumn, TransferSpeedColumn

    count = (MofNCompleteColumn(), "tokens") if label in OF_TOKENS else (DownloadColumn(), TransferSpeedColumn())
    parts = label, BarColumn(), *count, TimeRemainingColumn()
    with _signals_as_exceptions(), progress_bar(*parts) as progress:
        task = progress.add_task("", total=size)
        yield lambda done: progress.advance(task, done)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, where their usual effect is the process's end."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [number for number in signals if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
