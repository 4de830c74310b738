"""Files that appear under their name only when they are whole and on disk."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rwkv_cli.errors import FormatError

_FRESH = 60
"""Seconds for which a file may be without a lock, since it is made before it is locked."""


@contextlib.contextmanager
def replacing(path: Path, overwrite: bool = True) -> Iterator[IO[bytes]]:
    """A file beside `path` that becomes `path` if the block succeeds and vanishes if it does not.

    A symbolic link stays, and its target is replaced. Raises FormatError for a device or a pipe, which stay, too.
    """
    taken = FileExistsError(f"{path} exists; give --force to replace it, or another DST")
    if os.path.lexists(path) and not overwrite:
        raise taken
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    check_regular(path)
    _remove_left_behind(path.parent)
    part = path.with_name(f".rwkv-{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            lock(file)  # as long as it is open, nobody takes it for one that was left behind
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            part.replace(path)
        else:
            _move(part, path)
    except FileExistsError:
        raise taken from None
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(part)):
            raise
        raise OSError(error.errno, f"{error.strerror}; nothing was written", str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _remove_left_behind(folder: Path) -> None:
    """Remove files of processes that were killed while they wrote into this folder."""
    for part in folder.glob(".rwkv-*.part"):
        with contextlib.suppress(OSError), part.open("rb") as file:
            if time.time() - part.stat().st_mtime > _FRESH and lock(file):
                part.unlink()


def lock(file: IO[bytes]) -> bool | None:
    """Lock a file for this process. Returns False where another one has it, and None where there are no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, and some file systems
        return None
    return True


def check_regular(path: Path) -> None:
    """Raise FormatError for a device, a pipe or a socket. Reading it might never end, and writing would replace it."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FormatError(f"{path} is a device or a pipe, not a file; name a file")


def _move(part: Path, path: Path) -> None:
    """Give `part` the name `path`, but replace nothing that has appeared there meanwhile."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # some file systems have no hard links, such as exFAT
        if os.path.lexists(path):
            raise FileExistsError from None
        part.replace(path)
