"""The models folder: converted models by name, each with a record of where it came from.

A model NAME is the file NAME.safetensors. Its record is NAME.json beside it, which is made first, so that two sources
never take the same name. The time of the record is when the model was used last.
"""

import contextlib
import difflib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import platformdirs

from rwkv_cli.errors import ModelNameError

_ENDING = ".safetensors"


@dataclass(frozen=True)
class Origin:
    """The source that a model was converted from, and how."""

    source: str
    """The path of a checkpoint, or its place in the net."""
    state: list[list[Any]]
    """The marks of the source's files, which change with it: the name, the size, and the time or the hash."""
    quantization: str

    @classmethod
    def of(cls, source: Path, quantization: str) -> "Origin":
        """Describe a checkpoint on disk as it is now."""
        files = [file for file in sorted(source.iterdir()) if file.is_file()] if source.is_dir() else [source]
        facts = [(file.name, file.stat()) for file in files]
        state = [[name, fact.st_size, fact.st_mtime_ns] for name, fact in facts]
        return cls(os.path.normpath(source.absolute()), state, quantization)


def folder() -> Path:
    """Return the models folder. Raises ModelNameError for a user without a home folder."""
    named = os.environ.get("RWKV_MODELS")
    if named:
        return Path(named).absolute()
    try:
        return platformdirs.user_data_path("rwkv", appauthor=False) / "models"
    except RuntimeError:
        raise ModelNameError("this user has no home folder to keep models in; set RWKV_MODELS to a folder") from None


def names() -> list[str]:
    """List the names of all models in the folder."""
    files = (path for path in folder().glob(f"[!.]*{_ENDING}") if path.is_file())
    return sorted(path.name.removesuffix(_ENDING) for path in files)


def path_of(name: str) -> Path:
    """Return the file of the model with this name. Raises ModelNameError if there is none."""
    name = name.removesuffix(_ENDING)
    if name not in names():
        raise ModelNameError(f"no model is called {name} ({_hint(name)})")
    return folder() / f"{name}{_ENDING}"


def name_of(path: Path) -> str:
    """Return the name of a model: without its ending if it lies in the models folder."""
    return path.name.removesuffix(_ENDING) if path.parent.resolve() == folder().resolve() else path.name


def find(word: str) -> Path:
    """Return what a path, a name or the unique beginning of a name stands for. A path goes first.

    A name may be given without its last part, such as int8. Raises ModelNameError for a word that stands for no model
    or for several, and OSError for a path that cannot be reached.
    """
    if Path(word).name != word:
        Path(word).stat()
        return Path(word)
    if os.path.lexists(word):
        return Path(word)
    known, wanted = names(), word.removesuffix(_ENDING).casefold()
    for fits in (
        [name for name in known if name == word.removesuffix(_ENDING)],
        [name for name in known if wanted in (name.casefold(), name.casefold().rpartition(".")[0])],
        [name for name in known if name.casefold().startswith(wanted)],
    ):
        if len(fits) == 1:
            return folder() / f"{fits[0]}{_ENDING}"
    if fits:
        raise ModelNameError(f"{word}: may be {_listed(fits)}; give more of the name")
    raise ModelNameError(f"{word}: No such file or directory, and no model has this name ({_hint(wanted)})")


def again(path: Path) -> Path | None:
    """Return a model that was used before: where it was, or under its name in the folder, or None."""
    moved = folder() / path.name
    return path if path.exists() else moved if moved.exists() else None


def _hint(wanted: str) -> str:
    """Name the models that may be meant: the nearest ones, or all."""
    known = names()
    if not known:
        return f"the models folder {folder()} is empty; rwkv pull gets a model"
    near = difflib.get_close_matches(wanted, known, 3, 0.5)
    return f"{'nearest' if near else 'known'}: {_listed(near or known)}"


def _listed(found: list[str]) -> str:
    """Write some names as a sentence has them."""
    return ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")


def remove(name: str) -> None:
    """Delete a model and its record. Raises ModelNameError if there is none."""
    path = path_of(name)
    path.unlink()
    _record(path).unlink(missing_ok=True)


def last_used(path: Path) -> float | None:
    """Return when a model of the folder was used last, in seconds since 1970, or None where nobody knows."""
    try:
        return _record(path).stat().st_mtime
    except OSError:
        return None


def note_use(path: Path) -> None:
    """Note that a model is used now, if it lies in the folder and that can be written to."""
    if path.parent == folder():
        with contextlib.suppress(OSError):
            _record(path).touch()


def made_from(origin: Origin) -> Path | None:
    """Return the file that was or is to be made from this source, which may have changed since."""
    for record in sorted(folder().glob("[!.]*.json")):
        found = _read(record)
        if found and (found.source, found.quantization) == (origin.source, origin.quantization):
            return record.with_suffix(_ENDING)
    return None


def is_current(path: Path, origin: Origin) -> bool:
    """Return whether the file is there and was made from the source as it is now."""
    return path.is_file() and _read(_record(path)) == origin


@contextlib.contextmanager
def place(origin: Origin, file: str) -> Iterator[Path]:
    """A path for a model of this origin, to be written in the block. `file` is its name if it has none yet.

    The record is written when the block succeeds. If it fails, a new name is free again.
    """
    known = made_from(origin)
    path = known or _reserve(origin, file)
    try:
        yield path
    except BaseException:
        if known is None:
            _record(path).unlink(missing_ok=True)
        raise
    _record(path).write_text(_written(origin), "utf-8")


def _reserve(origin: Origin, file: str) -> Path:
    """Take a free name by writing its record: model.int8, or model-2.int8. Makes the folder if it is not there."""
    stem, _, format = file.removesuffix(_ENDING).rpartition(".")
    try:
        folder().mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ModelNameError(f"{folder()}: is a file; name a folder for models with $RWKV_MODELS") from None
    for count in itertools.count(1):
        number = f"-{count}" if count > 1 else ""
        path = folder() / f"{stem}{number}.{format}{_ENDING}"
        if not os.path.lexists(path):
            with contextlib.suppress(FileExistsError), _record(path).open("x", encoding="utf-8") as record:
                record.write(_written(origin))
                break
    return path


def _record(path: Path) -> Path:
    """Return the record of a model."""
    return path.with_suffix(".json")


def _written(origin: Origin) -> str:
    """Write a record."""
    return json.dumps(asdict(origin), indent=1)


def _read(record: Path) -> Origin | None:
    """Read a record, None for one that says nothing."""
    try:
        return Origin(**json.loads(record.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
