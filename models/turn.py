"""A lock that is free in a forked child, where nobody is left who could release it."""

import os
import threading
import weakref
from types import TracebackType


class Turn:
    """A lock, held by `with`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _TURNS.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._lock.release()

    def locked(self) -> bool:
        """True while somebody holds it."""
        return self._lock.locked()

    def renew(self) -> None:
        """Forget who holds it."""
        self._lock = threading.Lock()


_TURNS: weakref.WeakSet[Turn] = weakref.WeakSet()
"""Every lock of this process."""


def _renew_all() -> None:
    for turn in _TURNS:
        turn.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
