"""torch `.pth` files without torch: a zip of raw storages and a pickle that says which tensor lies where.

The pickle is never trusted. It is scanned opcode by opcode first; then an unpickler runs it that knows only the few
names tensors need, and those build descriptions (`SourceTensor`), not tensors. Nothing in the file is executed.
"""

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_cli.quant.errors import FormatError
from rwkv_cli.quant.source import SourceTensor, extent
from rwkv_cli.quant.tensor import BITS

_DTYPES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
_MAX_PICKLE = 64 << 20
_LOCAL_HEADER = 30


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


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    ok = isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    if not ok or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor is described wrongly")
    if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
        raise pickle.UnpicklingError("a tensor has a negative or non-integer size, stride or offset")
    return _View(storage, offset, shape, strides)


def _parameter(view: Any, *_: Any) -> Any:
    return view


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and name.endswith("Storage"):
            return _StorageType(name)
        raise pickle.UnpicklingError(f"it asks to call {module}.{name}, which no tensor needs")

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("a storage is described wrongly")
        _, kind, key, _, numel = pid
        if not (isinstance(kind, _StorageType) and isinstance(key, str) and type(numel) is int and numel >= 0):
            raise pickle.UnpicklingError("a storage is described wrongly")
        if kind.name not in _DTYPES:
            raise pickle.UnpicklingError(f"it holds a {kind.name}; only float32, float16 and bfloat16 can be read")
        return _Storage(_DTYPES[kind.name], key, numel)


def open_pth(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of a `.pth` (torch ≥ 1.6), strided and shared storages included.

    Raises FormatError for anything but a flat dictionary of float tensors whose storages lie in the file.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = {info.filename: info for info in archive.infolist()}
            found = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(found) != 1:
                raise FormatError(f"{path}: a zip without torch's data.pkl, so not a torch checkpoint")
            prefix = found[0].removesuffix("data.pkl")
            if entries[found[0]].file_size > _MAX_PICKLE:
                raise FormatError(f"{path}: its data.pkl is larger than any checkpoint's")
            order = entries.get(prefix + "byteorder")
            if order is not None and order.file_size < 16 and archive.read(order).strip() != b"little":
                raise FormatError(f"{path}: saved on a big-endian machine, which is not supported")
            tree = _unpickle(path, archive.read(found[0]))
            size = path.stat().st_size
            return {
                name: _locate(path, file, size, entries.get(f"{prefix}data/{view.storage.key}"), name, view)
                for name, view in _flat(path, tree).items()
            }
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path}: broken or truncated torch file ({error}); download it again") from None


def _unpickle(path: Path, data: bytes) -> Any:
    try:
        for opcode, argument, _ in pickletools.genops(data):
            # a memo index allocates that many slots
            if opcode.name.endswith("PUT") and int(argument or 0) > len(data):
                raise pickle.UnpicklingError("a memo index out of range")
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # hostile bytes raise whatever they like; none of it came from a call they chose
        raise FormatError(f"{path}: refused to load its pickle: {error}") from None


def _flat(path: Path, tree: Any) -> dict[str, _View]:
    if not isinstance(tree, dict) or not tree:
        raise FormatError(f"{path}: holds {type(tree).__name__}, not a dictionary of tensors")
    for name, view in tree.items():
        if not isinstance(name, str) or not isinstance(view, _View):
            raise FormatError(f"{path}: entry {name!r} is not a tensor; expected a flat dictionary of tensors")
    return tree


def _locate(path: Path, file: Any, size: int, entry: zipfile.ZipInfo | None, name: str, view: _View) -> SourceTensor:
    storage = view.storage
    if entry is None:
        raise FormatError(f"{path}: tensor {name}: its data (storage {storage.key}) is missing from the file")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise FormatError(f"{path}: tensor {name} is compressed; unpack and zip again without compression (zip -0)")
    item = BITS[storage.dtype].itemsize
    if entry.file_size != storage.numel * item or entry.compress_size != entry.file_size:
        raise FormatError(f"{path}: tensor {name}: storage {storage.key} has the wrong size; download the file again")
    if prod(view.shape) and view.offset + extent(view.shape, view.strides) > storage.numel:
        raise FormatError(f"{path}: tensor {name} reaches past the end of its storage")
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) != _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise FormatError(f"{path}: tensor {name}: no data where the file says; download it again")
    skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = entry.header_offset + _LOCAL_HEADER + skip
    if start + entry.file_size > size:
        raise FormatError(f"{path}: tensor {name} reaches past the end of the file; download it again")
    return SourceTensor(path, storage.dtype, view.shape, start + view.offset * item, view.strides)
