"""Opens a converted file, the one that `rwkv convert` writes and every other command reads."""

import contextlib
import json
import math
import mmap
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import FormatError, NotConvertedError, pasted
from rwkv_cli.quant.dtypes import BITS
from rwkv_cli.quant.formats import Floats, StoredTensor, format_of
from rwkv_cli.quant.formats.contract import Shape, Spec, StoredArray
from rwkv_cli.quant.header import FORMAT_VERSION
from rwkv_cli.quant.opening import open_source
from rwkv_cli.quant.replacing import check_regular
from rwkv_cli.quant.safetensors import is_converted, is_safetensors, read_header
from rwkv_cli.quant.source import SourceFile


class ModelFile(Protocol):
    """The interface that a model reads its weights from."""

    path: Path
    digest: str

    def metadata(self, key: str, kind: type, default: Any = None) -> Any:
        """The JSON value under `key`, of type `kind`. A key that is not there has the default, if there is one."""

    def names(self) -> list[str]:
        """Names of the model's tensors."""

    def tensor(self, name: str, shape: Shape) -> StoredTensor:
        """The tensor `name`, whose logical shape must be `shape`."""

    def vector(self, name: str, shape: Shape) -> NDArray[np.float32]:
        """The float32 tensor `name` of shape `shape`."""

    def read_by_row(self, name: str) -> None:
        """Have the system read only those pages of a tensor that are asked for, and none around them."""


class Checkpoint:
    """A read-only view of a converted file (docs/format.md). Tensors are views of one memory map.

    A folder stands for the one converted file in it. Raises FormatError where the file is not a whole, consistent
    converted model of a version this program knows; NotConvertedError for a checkpoint that may be converted.
    """

    def __init__(self, path: Path) -> None:
        path = _converted_in(path) if path.is_dir() else path
        self.path = path
        self._text: dict[str, str] = {}
        check_regular(path)
        if path.is_dir() or not is_safetensors(path):
            # this raises a better reason for a file that is no checkpoint at all
            open_source(path)
        else:
            file = SourceFile(path)
            self.stored, self._text = read_header(file)
        if self._text.get("format") != "rwkv":
            raise NotConvertedError(
                f"{path}: not a converted model; convert it first: {pasted('rwkv', 'convert', path)}"
            )
        version = self._text.get("format_version", "")
        if not re.fullmatch("[1-9][0-9]{0,8}", version):
            raise FormatError(f"{path}: no format version in the file; convert the model again")
        if int(version) > FORMAT_VERSION:
            raise FormatError(f"{path}: written in format {version}, newer than {FORMAT_VERSION}; upgrade rwkv-cli")
        self._layouts: dict[str, Any] = self.metadata("tensors", dict)
        self._memory = _mapped(file)
        self._map = np.frombuffer(self._memory, np.uint8)
        self.digest = self._text.get("digest", "")

    def metadata(self, key: str, kind: type, default: Any = None) -> Any:
        """The JSON value under `key`, of type `kind`. A key that is not there has the default, if there is one."""
        if key not in self._text and default is not None:
            return default
        try:
            value = json.loads(self._text[key])
            json.dumps(value, ensure_ascii=False).encode()  # which fails for half a surrogate pair
        except (KeyError, ValueError, RecursionError):
            value = None
        if not isinstance(value, kind):
            raise FormatError(f"{self.path}: metadata {key!r} is missing or damaged; convert the model again")
        return value

    def has(self, key: str) -> bool:
        """True if there is metadata under `key`."""
        return key in self._text

    def _where(self, name: str) -> str:
        return f"{self.path}: tensor {name}"

    def names(self) -> list[str]:
        """Names of the model's tensors (scales and tokenizer not counted)."""
        return list(self._layouts)

    def layout(self, name: str) -> dict[str, Any]:
        """The description of a tensor in the metadata: its `layout`, its logical `shape` and what its format adds."""
        entry: Any = self._layouts.get(name)
        shape = entry.get("shape") if isinstance(entry, dict) else None
        sizes = shape if isinstance(shape, list) and len(shape) <= 4 else [None]
        if any(type(n) is not int or not 0 <= n < 1 << 32 for n in sizes):
            raise FormatError(f"{self._where(name)} is missing or described wrongly; convert the model again")
        return {"layout": "", **entry}

    def error(self, name: str) -> float | None:
        """The relative error ‖stored − source‖ / ‖source‖, or None for a float tensor and for a file that lacks it."""
        value = self.layout(name).get("error")
        if value is not None and (type(value) is not float or not 0 <= value < math.inf):
            raise FormatError(f"{self._where(name)} is described wrongly; convert the model again")
        return value

    def stored_bytes(self, name: str) -> int:
        """The bytes of all arrays that hold `name`."""
        layout = format_of(self.layout(name)["layout"])
        suffixes = layout.SUFFIXES if layout else ("",)
        return sum(self.array(name + suffix).nbytes for suffix in suffixes)

    def array(self, name: str) -> NDArray[Any]:
        """A stored array as its bits, read-only."""
        if name not in self.stored:
            raise FormatError(f"{self._where(name)} is missing; convert the model again")
        tensor = self.stored[name]
        kind = BITS[tensor.dtype]
        size = int(np.prod(tensor.shape, dtype=np.int64)) * kind.itemsize
        raw = self._map[tensor.start : tensor.start + size]
        if tensor.start % kind.itemsize:
            raw = raw.copy()
            raw.flags.writeable = False
        return raw.view(kind).reshape(tensor.shape)

    def read_by_row(self, name: str) -> None:
        """Have the system read only those pages of a tensor that are asked for, and none around them."""
        layout = format_of(self.layout(name)["layout"])
        for suffix in layout.SUFFIXES if layout else ():
            start, array = self.stored[name + suffix].start, self.array(name + suffix)
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            if first < start + array.nbytes:
                with contextlib.suppress(AttributeError, OSError):
                    self._memory.madvise(mmap.MADV_RANDOM, first, start + array.nbytes - first)
                    self._memory.madvise(mmap.MADV_NOHUGEPAGE, first, start + array.nbytes - first)

    def tensor(self, name: str, shape: Shape) -> StoredTensor:
        """The tensor `name`, whose logical shape must be `shape`."""
        entry = self.layout(name)
        layout, found = entry["layout"], entry["shape"]
        if found != list(shape):
            raise FormatError(f"{self._where(name)} has shape {found}, not {list(shape)}; convert the model again")
        format, spec = format_of(layout), Spec(layout, shape)
        if format is None or not format.accepts(spec, entry):
            raise FormatError(f"{self._where(name)} is described wrongly; convert the model again")
        bits = {name + ending: self.array(name + ending) for ending in format.SUFFIXES}
        arrays = [StoredArray(self.stored[part].dtype, array) for part, array in bits.items()]
        try:
            tensor: StoredTensor = format.read(spec, entry, arrays)
        except FormatError as error:
            raise FormatError(f"{self._where(name)} {error}; convert the model again") from None
        return tensor

    def vector(self, name: str, shape: Shape) -> NDArray[np.float32]:
        """The float32 tensor `name` of shape `shape`."""
        tensor = self.tensor(name, shape)
        if not isinstance(tensor, Floats) or tensor.dtype != "F32":
            raise FormatError(f"{self._where(name)} must be float32; convert the model again")
        return tensor.bits


def _mapped(file: SourceFile) -> mmap.mmap:
    """The file as a read-only map, in huge pages where the system has them for files.

    Each token reads all weights. With small pages the CPU would look up an address every 4 KB.
    """
    memory = mmap.mmap(file.file.fileno(), file.size, access=mmap.ACCESS_READ)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _converted_in(folder: Path) -> Path:
    """The converted file in a folder, or the folder itself if it has none. Raises FormatError for several."""
    found = [file for file in sorted(folder.glob("*.safetensors")) if is_converted(file)]
    if len(found) > 1:
        raise FormatError(f"{folder}: holds {len(found)} converted models; name one, such as {found[0]}")
    return found[0] if found else folder
