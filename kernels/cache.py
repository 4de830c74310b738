"""The folder of compiled kernels, which are never stale, and a call for when one has to be compiled.

numba's own cache watches only the file of the function it caches, not its callees or imported constants. So the cache
folder is named by a hash of all kernel sources and of the compilers' versions.
"""

import errno
import functools
import getpass
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.event import Event, Listener, register, unregister
from platformdirs import user_cache_path

config: Any = numba.core.config
"""numba's settings, which it makes at run time."""


_LISTENERS: list[Callable[[str], object]] = []
_SAID: set[str] = set()


def on_trouble(say: Callable[[str], object]) -> None:
    """Have `say` called with a sentence, once for each kind of trouble with the folder of compiled kernels."""
    _LISTENERS.append(say)


def tell(sentence: str) -> None:
    """Say a sentence about the folder, if it was not said before."""
    if sentence not in _SAID:
        _SAID.add(sentence)
        for say in _LISTENERS:
            say(sentence)


def _users_own() -> Path | None:
    """The user's folder for caches, None for a user without a home folder."""
    try:
        return user_cache_path("rwkv")
    except RuntimeError:
        return None


@functools.cache
def cache_folder() -> Path:
    """The folder for compiled kernels: below $NUMBA_CACHE_DIR or in the user's cache, or where that is read-only in one
    of the user's own below the system's temporary folder. What lies there is run: nobody else may write to it."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    name = f"kernels-{digest.hexdigest()[:16]}"
    shared = Path(tempfile.gettempdir()) / f"rwkv-{os.getuid() if hasattr(os, 'getuid') else getpass.getuser()}"
    wanted = os.environ.get("NUMBA_CACHE_DIR")
    full: list[str] = []
    for parent in (Path(wanted) if wanted else _users_own(), shared):
        if parent is None:
            continue
        try:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            (parent / name).mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=parent / name):
                pass
        except OSError as error:
            full += [f"{parent}: {error.strerror}"] if error.errno in (errno.ENOSPC, errno.EDQUOT) else []
            continue
        if not hasattr(os, "getuid") or (parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o022):
            found = parent / name
            break
    else:
        found = Path(tempfile.mkdtemp(prefix="rwkv-kernels-"))
    for reason in full:
        tell(f"{reason}. Compiled kernels are kept in {found} instead.")
    return found


class _Announce(Listener):
    def __init__(self, say: Callable[[], object]) -> None:
        self.say, self.said = say, False

    def on_start(self, event: Event) -> None:  # noqa: ARG002 - the library's interface
        if not self.said:
            self.said = True
            self.say()

    def on_end(self, event: Event) -> None:
        pass


ANNOUNCERS: list[Listener] = []
"""For another compiler than numba's own to tell, too."""


@contextmanager
def on_first_compilation(say: Callable[[], object]) -> Iterator[None]:
    """Have `say` called once in this block, if and when a kernel has to be compiled rather than read from the cache."""
    announcer = _Announce(say)
    ANNOUNCERS.append(announcer)
    register("numba:compile", announcer)
    try:
        yield
    finally:
        unregister("numba:compile", announcer)
        ANNOUNCERS.remove(announcer)
