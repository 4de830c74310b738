"""The reading of a person's turns: line editing and history on a terminal, plain lines from anywhere else."""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import platformdirs

from rwkv_cli.engine.encodings import utf8_blocks

Words = Mapping[str, Callable[[], Iterable[str]]]
"""Commands, and the words that may follow each."""


def is_terminal() -> bool:
    """Return whether a person reads and writes here."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def reader(words: Words) -> Callable[[str], str]:
    """Make a function that reads one turn, given the text to start from.

    The function raises EOFError at the end of input and KeyboardInterrupt on Ctrl-C.
    """
    if is_terminal():
        return _terminal_reader(words)
    lines = _lines()

    def read(_default: str) -> str:
        if sys.stdin.isatty() and sys.stderr.isatty():  # a person, whose answers go into a pipe or a file
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    return read


def _lines() -> Iterator[str]:
    """Yield the lines of standard input as they come, without their ends."""
    rest = ""
    for block in utf8_blocks(iter(sys.stdin.buffer.readline, b"")):
        *whole, rest = (rest + block.decode("utf-8", "replace")).split("\n")
        yield from (line.removesuffix("\r") for line in whole)
    if rest:
        yield rest


@contextmanager
def on_interrupt(react: Callable[[], object]) -> Iterator[None]:
    """Call `react` on Ctrl-C instead of raising, so that no kernel is ever torn out of a token."""
    before = signal.signal(signal.SIGINT, lambda *_: react())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def no_echo() -> Iterator[None]:
    """Hide the keys typed meanwhile. They wait for the next prompt. Without a terminal nothing is done."""
    try:
        import termios

        before = termios.tcgetattr(sys.stdin)
    except (ImportError, termios.error, ValueError, OSError):  # Windows, or no terminal
        yield
        return
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _terminal_reader(words: Words) -> Callable[[str], str]:
    """Make the reader for a terminal. Alt-Enter begins a new line; Up and Ctrl-R look through earlier turns."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.key_binding import KeyBindings

    class Commands(Completer):
        def get_completions(self, document: Any, complete_event: Any) -> Iterator[Completion]:  # noqa: ARG002
            text = document.text_before_cursor
            command, blank, rest = text.partition(" ")
            found = words if not blank else words[command]() if command in words else ()
            typed = rest if blank else command
            if text.startswith("/"):
                yield from (Completion(w, -len(typed)) for w in found if w.startswith(typed) and w != typed)

    keys = KeyBindings()
    new_line: Any = lambda event: event.current_buffer.insert_text("\n")  # noqa: E731 - two keys do it
    keys.add("escape", "enter")(new_line)
    # A dumb terminal does not mark what is pasted. There a line is not the last one where more has come already.
    dumb = os.environ.get("TERM", "dumb") == "dumb"
    pasted = Condition(lambda: dumb and bool(get_app().key_processor.input_queue))
    keys.add("enter", filter=pasted, eager=True)(new_line)
    session: Any = PromptSession(
        [("bold", "> ")],
        history=_history(),
        completer=Commands(),
        key_bindings=keys,
        prompt_continuation=[("", "  ")],
        enable_history_search=True,
        reserve_space_for_menu=4,
    )

    def read(default: str) -> str:
        line: str = session.prompt(default=default)
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # some keys are no UTF-8

    return read


def _history() -> Any:
    """Open the history of earlier runs, for the user's eyes only. It stays in memory where no file can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # the disk may be full
                super().store_string(string)

    try:
        path = platformdirs.user_state_path("rwkv", appauthor=False) / "history"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    except (OSError, RuntimeError):  # platformdirs finds no home folder
        return InMemoryHistory()
    return History(path)
