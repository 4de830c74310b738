"""Bounds for a program that a model's file brings: the time that it runs, and the memory that it takes."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SECONDS = 5.0
"""The longest time. Real templates take milliseconds."""

_MEMORY = 1 << 30
"""Bytes of memory beside what the process has before."""

_ONE = threading.Lock()
"""The limit of memory is the process's, so that one thread at a time may change it."""


class TooLongError(BaseException):
    """The program has run too long. It is no Exception, so that no library goes on after it."""


@contextmanager
def bounded() -> Iterator[None]:
    """Stop what is called in this block once it has run too long (TooLongError) or takes too much (MemoryError).

    A function of Python's is stopped at its next line. One in C runs to its end. Memory is bounded on Linux only.
    """
    deadline = time.monotonic() + _SECONDS

    def watch(*_: Any) -> Any:
        if time.monotonic() > deadline:
            raise TooLongError
        return watch

    before = sys.gettrace()
    with _memory_bounded():
        sys.settrace(watch)
        try:
            yield
        finally:
            sys.settrace(before)


@contextmanager
def _memory_bounded() -> Iterator[None]:
    """Keep the process from taking much more memory than it has."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except (ImportError, OSError):
        yield
        return
    most = pages * resource.getpagesize() + _MEMORY
    with _ONE:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        if soft == resource.RLIM_INFINITY or soft > most:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
