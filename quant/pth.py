"""Reads torch `.pth` files without torch: a zip of raw storages and a pickle that says which tensor lies where.

The pickle is never loaded. A loop reads its opcodes and knows only those that torch.save writes, and only the names
that tensors need. The results are descriptions (`SourceTensor`), not tensors. Nothing in the file is executed.
"""

import pickletools
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

from rwkv_cli.errors import FormatError
from rwkv_cli.quant.dtypes import BITS
from rwkv_cli.quant.source import SourceTensor, check_name, extent

_DTYPES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
_MAX_PICKLE = 8 << 20
_LOCAL_HEADER = 30
_DAMAGED = "broken or truncated torch file"


class _RefusedError(Exception):
    """A pickle asks for something that it does not get."""


class _StorageType(NamedTuple):
    name: str


class _Storage(NamedTuple):
    dtype: str
    key: str
    numel: int


class _View(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> _View:
    ok = isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    if not ok or not len(shape) == len(strides) <= 8:
        raise _RefusedError("a tensor is described wrongly")
    if any(type(n) is not int or not 0 <= n < 1 << 48 for n in (offset, *shape, *strides)):
        raise _RefusedError("a size, stride or offset of a tensor is out of range")
    # requires_grad and hooks come first, then bits such as "negative" that change the values
    if any(more[2:]):
        raise _RefusedError("a tensor carries metadata that is not supported; save a plain copy of it (.clone())")
    return _View(storage, offset, shape, strides)


def _parameter(view: Any, *_: Any) -> Any:
    return view


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): lambda: {},
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


def _named(module: Any, name: Any) -> Any:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise _RefusedError("a name in it is not text")
    if (module, name) in _ALLOWED:
        return _ALLOWED[module, name]
    if module == "torch" and name.endswith("Storage"):
        return _StorageType(name)
    raise _RefusedError(f"it asks for {f'{module}.{name}'!r:.80}, which no tensor needs")


def _storage(pid: Any) -> _Storage:
    match pid:
        case ("storage", _StorageType(name), str(key), _, int(numel)) if name in _DTYPES:
            return _Storage(_DTYPES[name], key, numel)
        case ("storage", _StorageType(name), *_):
            raise _RefusedError(f"it holds a {name!r:.80}; only float32, float16 and bfloat16 can be read")
    raise _RefusedError("a storage is described wrongly")


def open_pth(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of a `.pth` (torch ≥ 1.6), strided and shared storages included.

    Raises FormatError for anything but a flat dictionary of float tensors whose storages lie in the file.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            return _Archive(path, archive, file).tensors()
    except (
        zipfile.BadZipFile,
        EOFError,
        NotImplementedError,
        OSError,
        OverflowError,
        RuntimeError,
        ValueError,
    ) as error:
        # an OSError without a file name comes from an impossible offset
        if isinstance(error, FormatError) or getattr(error, "filename", None) is not None:
            raise
        raise FormatError(f"{path}: {_DAMAGED} ({error}); download it again") from None


class _Archive:
    """The zip file of a checkpoint, open as a zip and as plain bytes."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, file: IO[bytes]) -> None:
        self._path, self._archive, self._file = path, archive, file
        self._size = path.stat().st_size
        self._entries = {info.filename: info for info in archive.infolist()}

    def tensors(self) -> dict[str, SourceTensor]:
        """Every tensor by its name."""
        found = [name for name in self._entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(found) != 1:
            raise FormatError(
                f"{self._path}: a zip without torch's data.pkl, so not a checkpoint; give the .pth itself"
            )
        (pickle,) = found
        prefix = pickle.removesuffix("data.pkl")
        order = self._entries.get(prefix + "byteorder")
        if order is not None and self._content(order).strip() != b"little":
            raise FormatError(
                f"{self._path}: saved on a big-endian machine, which is not supported; save it on another"
            )
        tree = _unpickled(self._path, self._content(self._entries[pickle]))
        return {
            name: self._locate(self._entries.get(f"{prefix}data/{view.storage.key}"), name, view)
            for name, view in _flat(self._path, tree).items()
        }

    def _content(self, entry: zipfile.ZipInfo) -> bytes:
        self._check_stored(entry)
        if entry.file_size > _MAX_PICKLE:
            raise FormatError(
                f"{self._path}: {entry.filename!r} in it is larger than any checkpoint's; download it again"
            )
        return self._archive.read(entry)

    def _check_stored(self, entry: zipfile.ZipInfo) -> None:
        """Refuse an entry that is compressed."""
        if entry.compress_type != zipfile.ZIP_STORED:
            raise FormatError(
                f"{self._path}: {entry.filename!r} in it is compressed; "
                "unpack and zip again without compression (zip -0)"
            )

    def _locate(self, entry: zipfile.ZipInfo | None, name: str, view: _View) -> SourceTensor:
        """The place of a tensor in the file."""
        storage, where = view.storage, f"{self._path}: tensor {name}"
        if entry is None:
            raise FormatError(f"{where}: its data (storage {storage.key!r}) is missing; download it again")
        self._check_stored(entry)
        item = BITS[storage.dtype].itemsize
        if entry.file_size != storage.numel * item or entry.compress_size != entry.file_size:
            raise FormatError(f"{where}: storage {storage.key!r} has the wrong size; download the file again")
        if prod(view.shape) and view.offset + extent(view.shape, view.strides) > storage.numel:
            raise FormatError(f"{where} reaches past the end of its storage; download the file again")
        header = b""
        if entry.header_offset < self._size:
            self._file.seek(entry.header_offset)
            header = self._file.read(_LOCAL_HEADER)
        if len(header) != _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
            raise FormatError(f"{where}: no data where the file says; download it again")
        skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = entry.header_offset + _LOCAL_HEADER + skip
        if start + entry.file_size > self._size:
            raise FormatError(f"{where} reaches past the end of the file; download it again")
        return SourceTensor(self._path, storage.dtype, view.shape, start + view.offset * item, view.strides)


def _unpickled(path: Path, data: bytes) -> Any:
    try:
        return _interpret(data)
    except _RefusedError as error:
        raise FormatError(f"{path}: its pickle is refused, and nothing in it was run: {error}") from None
    except Exception:  # hostile bytes may raise anything, though never by a call of their choice
        raise FormatError(f"{path}: {_DAMAGED} (data.pkl in it makes no sense); download it again") from None


def _interpret(data: bytes) -> Any:
    """The value that a pickle of protocol 2 to 5 describes.

    Keys must be strings or integers, since hashing a deep tuple would crash.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def popped(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(popped(len(stack) - int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(popped(marks.pop())))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "SETITEM" | "SETITEMS":
                items = popped(marks.pop() if opcode.name == "SETITEMS" else len(stack) - 2)
                if not all(type(key) in (str, int) for key in items[::2]):
                    raise _RefusedError("a key of a dictionary is neither text nor a number")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "APPEND" | "APPENDS":
                items = popped(marks.pop() if opcode.name == "APPENDS" else len(stack) - 1)
                stack[-1] += items
            case "GLOBAL":
                stack.append(_named(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_named(*popped(len(stack) - 2)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                function, arguments = popped(len(stack) - 2)
                stack.append(function(*arguments))
            case "BUILD":
                stack.pop()  # a state_dict has its _metadata here
            case "STOP":
                return stack.pop()
            case _:
                raise _RefusedError(f"it uses {opcode.name}, which no checkpoint needs")
    return None


def _flat(path: Path, tree: Any) -> dict[str, _View]:
    if not isinstance(tree, dict) or not tree:
        what = "an empty dictionary" if tree == {} else type(tree).__name__
        raise FormatError(f"{path}: holds {what}, not a dictionary of tensors; give a model's checkpoint")
    for name, view in tree.items():
        if not isinstance(name, str) or not isinstance(view, _View):
            raise FormatError(f"{path}: entry {name!r:.80} is not a tensor; expected a flat dictionary of tensors")
        check_name(path, name)
    return tree
