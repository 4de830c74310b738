"""A file of JSON lines that a run adds to. A run that was stopped goes on after the whole lines in it."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Generic, Protocol, TypeVar

from rwkv_cli.errors import JobError

Key = TypeVar("Key")
Value = TypeVar("Value")
KeyOut = TypeVar("KeyOut", covariant=True)
ValueOut = TypeVar("ValueOut", covariant=True)


class Kind(Protocol[KeyOut, ValueOut]):
    """The meaning of a file's lines."""

    name: str
    """The name of a line in errors."""

    def read(self, record: Any) -> tuple[KeyOut, ValueOut]:
        """Take one line's JSON apart. Raises JobError for a record of something else than this run.

        Raises KeyError, TypeError, ValueError or ArithmeticError where it is no record of this kind at all.
        """

    def beginnings(self) -> Iterable[bytes]:
        """The beginnings of the lines of this run."""


class RecordFile(Generic[Key, Value]):
    """An open file of records. `found` has those that need not be made again."""

    def __init__(self, path: Path, file: IO[bytes], kind: Kind[Key, Value]) -> None:
        """Read the records that are there, and cut off a last line that is not whole.

        Raises JobError where a line is not one that belongs there.
        """
        self.path, self._file, self._kind = path, file, kind
        self.found: dict[Key, Value] = {}
        if path.is_file():
            file.truncate(self._read())

    def _read(self) -> int:
        """Note what is there. Returns how many bytes of the file are whole lines.

        A last line that was cut short does not count, if it begins as one of this run does.
        """
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.path} line {number}"
                whole = line.endswith(b"\n")
                try:
                    key, value = self._kind.read(json.loads(line))
                except JobError as error:
                    raise JobError(f"{where}: {error}; give --output another file") from None
                except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
                    if isinstance(error, json.JSONDecodeError) and not whole and self._begins(line):
                        break
                    raise JobError(f"{where}: not {self._kind.name}; give --output another file") from None
                if not whole:
                    break
                self.found[key] = value
                end += len(line)
        return end

    def _begins(self, line: bytes) -> bool:
        """Return whether a line may be the beginning of one of this run."""
        return any(line.startswith(head) or head.startswith(line) for head in self._kind.beginnings())

    def add(self, line: bytes) -> None:
        """Write a line at once."""
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


@contextmanager
def open_records(path: Path, kind: Kind[Key, Value]) -> Iterator[RecordFile[Key, Value]]:
    """Open a file of records to be added to. No other run may add to it meanwhile, or JobError is raised."""
    with path.open("ab", buffering=0) as file:
        if sys.platform != "win32" and path.is_file():
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JobError(
                    f"{path}: another run is writing its answers there; wait for its end, or give --output another file"
                ) from None
            except OSError:  # a file system without locks
                pass
        yield RecordFile(path, file, kind)
