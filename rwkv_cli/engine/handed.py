"""Files that workers on other machines need. Where they cannot be read under their path, they are brought in pieces."""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rwkv_cli.errors import WorkerError

_PIECE = 32 << 20
"""Bytes that travel together."""


@dataclass(frozen=True)
class Handed:
    """A file on the machine of the command, and what tells whether another machine has the same one."""

    path: Path
    """The path in full."""
    size: int
    marked: int
    """The number of bytes at its beginning that `digest` is made of."""
    digest: str

    @classmethod
    def text(cls, path: Path) -> "Handed":
        """Hand out a file that is told by all of its bytes."""
        size = path.stat().st_size
        return cls(path.absolute(), size, size, _digest(path, size))

    @classmethod
    def model(cls, path: Path) -> "Handed":
        """Hand out a converted model. Its header holds the digest of its values and how they are stored."""
        with path.open("rb") as file:
            marked = 8 + struct.unpack("<Q", file.read(8))[0]
        return cls(path.absolute(), path.stat().st_size, marked, _digest(path, marked))

    def here(self) -> bool:
        """Return whether this machine has the file under the same path."""
        return self._is(self.path)

    def _is(self, path: Path) -> bool:
        try:
            return path.stat().st_size == self.size and _digest(path, self.marked) == self.digest
        except OSError:
            return False

    def pieces(self) -> Iterator[bytes]:
        """Yield what the file holds."""
        with self.path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece

    def write(self, pieces: Iterable[bytes], path: Path) -> None:
        """Write the file anew at `path`. Raises WorkerError if it has changed since it was handed out."""
        with path.open("wb") as file:
            for piece in pieces:
                file.write(piece)
        if not self._is(path):
            raise WorkerError(f"{self.path}: has changed since the command began; run it again")


def _digest(path: Path, size: int) -> str:
    """Return the SHA-256 of the first bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()
