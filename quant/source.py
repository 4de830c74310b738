"""Foreign checkpoints, mapped and read-only: a `.pth`, a safetensors file, or a folder of either."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.quant.errors import FormatError
from rwkv_cli.quant.tensor import BITS, to_float32


@dataclass(frozen=True)
class SourceTensor:
    """Where a tensor lies in a file. Nothing is read before `bits` or `float32` is called."""

    path: Path
    dtype: str
    """A key of BITS."""
    shape: tuple[int, ...]
    start: int
    """Byte offset of the first element in the file."""
    strides: tuple[int, ...]
    """In elements, none negative."""

    def bits(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows [start, stop) of the first axis, mapped; the map goes away with the array."""
        kind = BITS[self.dtype]
        shape = self.shape
        offset = self.start
        if shape:
            stop = shape[0] if stop is None else min(stop, shape[0])
            shape = (stop - start, *shape[1:])
            offset += start * self.strides[0] * kind.itemsize
        if prod(shape) == 0:
            return np.empty(shape, kind)
        span = extent(shape, self.strides)
        flat = np.asarray(np.memmap(self.path, kind, "r", offset, (span,)))
        return np.lib.stride_tricks.as_strided(flat, shape, [s * kind.itemsize for s in self.strides], writeable=False)

    def float32(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """The same rows as float32, C-contiguous; read-only where they are the mapped ones."""
        return np.ascontiguousarray(to_float32(self.bits(start, stop), self.dtype))


Source = Mapping[str, SourceTensor]


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a C-contiguous array."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last that a strided view touches, both included; 0 for an empty one."""
    if prod(shape) == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def check_name(path: Path, name: str) -> None:
    """Refuse a tensor's name that would break a message into lines."""
    if not name.isprintable():
        raise FormatError(f"{path}: a tensor has the name {name!a:.80}; download the file again")


def open_source(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of a checkpoint by the name it has there.

    Raises FormatError for anything that is not a readable checkpoint, OSError where the system refuses.
    """
    if path.is_dir():
        return _open_folder(path)
    with path.open("rb") as file:
        head = file.read(512)
    return _reader(path, head)(path)


def _open_folder(folder: Path) -> dict[str, SourceTensor]:
    """A Hugging Face folder: all its *.safetensors, or else all its pytorch_model*.bin."""
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.pth"):
        files = sorted(folder.glob(pattern))
        if pattern == "*.pth" and len(files) > 1:
            raise FormatError(f"{folder}: holds {len(files)} .pth files; name the one to convert")
        if files:
            tensors: dict[str, SourceTensor] = {}
            for file in files:
                for name, tensor in open_source(file).items():
                    if name in tensors:
                        raise FormatError(f"{file}: tensor {name} is also in {tensors[name].path.name}")
                    tensors[name] = tensor
            _check_shards(folder, f"{pattern}.index.json", tensors)
            return tensors
    raise FormatError(f"{folder}: no *.safetensors, pytorch_model*.bin or *.pth in this folder")


def _check_shards(folder: Path, pattern: str, tensors: Mapping[str, SourceTensor]) -> None:
    """Refuse a folder whose index, a file named by `pattern`, lists a shard that is not there."""
    import json

    for index in sorted(folder.glob(pattern)):
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            missing = sorted({listed[name] for name in listed if name not in tensors})
        except (ValueError, KeyError, TypeError, RecursionError):
            raise FormatError(f"{index}: not a readable shard index; download it again") from None
        if missing:
            raise FormatError(f"{index}: tensors of shard {missing[0]} are missing from {folder}; download it again")


def _reader(path: Path, head: bytes) -> Callable[[Path], dict[str, SourceTensor]]:
    """Tell the format from the first bytes, never from the name; refuse what is known not to be a checkpoint."""
    from rwkv_cli.quant.pth import open_pth
    from rwkv_cli.quant.safetensors import open_safetensors

    text = head.lstrip().lower()
    if not head:
        raise FormatError(f"{path}: the file is empty; download it again")
    if head.startswith(b"PK\x03\x04"):
        return open_pth
    if head[:9].endswith(b"{"):
        return open_safetensors
    if text.startswith(b"version https://git-lfs"):
        raise FormatError(f"{path}: a Git-LFS pointer, not the file itself; run `git lfs pull` or download the file")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise FormatError(f"{path}: a web page saved under this name; download the file itself (the raw link)")
    if head.startswith(b"GGUF"):
        raise FormatError(f"{path}: a GGUF file; convert from the original .pth or safetensors instead")
    if head.startswith((b"ggmf", b"fmgg", b"lmgg")):
        raise FormatError(f"{path}: an rwkv.cpp file; convert from the original .pth instead")
    if head.startswith(b"\x80"):
        raise FormatError(
            f"{path}: a torch file from before version 1.6 (no zip); save it again with a newer torch: "
            "torch.save(torch.load(old), new)"
        )
    raise FormatError(f"{path}: neither a torch .pth nor a safetensors file; give a checkpoint, or download it again")
