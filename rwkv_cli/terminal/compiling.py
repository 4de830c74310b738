"""The loading of kernels before a command says anything, with a counter where they have to be compiled."""

import functools
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from rwkv_cli.terminal.output import note, one_line, progress_bar, shows_bars

if TYPE_CHECKING:
    from rwkv_cli.kernels.contract import Loadable

_SENTENCE = "Compiling kernels for this machine (only the first time)"
_said = False


def load_kernels(kernels: Iterable["Loadable"]) -> None:
    """Load kernels, each once. If one has to be compiled, a counter shows how many are done. It goes at the end."""
    from rwkv_cli.kernels.cache import on_first_compilation

    announce_trouble()
    todo = list(dict.fromkeys(kernels))
    done = 0
    with ExitStack() as stack:
        update: Callable[..., None] | None = None

        def begin() -> None:
            nonlocal update
            if shows_bars():
                from rich.progress import BarColumn, MofNCompleteColumn

                bar = stack.enter_context(progress_bar(_SENTENCE, BarColumn(), MofNCompleteColumn()))
                update = partial(bar.update, bar.add_task("", total=len(todo), completed=done))
            else:
                _say_once()

        stack.enter_context(on_first_compilation(begin))
        for done, kernel in enumerate(todo):
            if update is not None:
                update(completed=done)
            with _interrupts_held():
                kernel.load()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Have Ctrl-C wait for the end of the block. LLVM calls Python meanwhile, where an exception would be lost."""
    usual = signal.getsignal(signal.SIGINT)
    if not callable(usual) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _, frame: came.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if came:
        usual(signal.SIGINT, came[0])


@functools.cache
def announce_trouble() -> None:
    """Have a note printed where compiled kernels cannot be kept or are damaged."""
    from rwkv_cli.kernels.cache import on_trouble

    on_trouble(lambda sentence: note(one_line(sentence)))


def _say_once() -> None:
    """Say that kernels are compiled, where no bar can be shown."""
    global _said
    if not _said:
        _said = True
        note(f"{_SENTENCE} …")
