"""Opens a foreign checkpoint: a `.pth`, a safetensors file, or a folder of either."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from rwkv_cli.errors import FormatError
from rwkv_cli.quant.pth import open_pth
from rwkv_cli.quant.replacing import check_regular
from rwkv_cli.quant.safetensors import open_safetensors
from rwkv_cli.quant.source import SourceTensor


def open_source(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of a checkpoint by its name there.

    Raises FormatError for anything that is not a readable checkpoint, OSError where the system refuses.
    """
    if path.is_dir():
        return _open_folder(path)
    check_regular(path)
    with path.open("rb") as file:
        head = file.read(512)
    return _reader(path, head)(path)


def _open_folder(folder: Path) -> dict[str, SourceTensor]:
    """The tensors of a folder: those of all *.safetensors, else of all pytorch_model*.bin, else of the one *.pth."""
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
    """Refuse a folder if an index in it lists a shard that is not there. `pattern` matches the names of indices."""
    for index in sorted(folder.glob(pattern)):
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            missing = sorted({listed[name] for name in listed if name not in tensors})
        except (ValueError, KeyError, TypeError, RecursionError):
            raise FormatError(f"{index}: not a readable shard index; download it again") from None
        if missing:
            raise FormatError(f"{index}: tensors of shard {missing[0]} are missing from {folder}; download it again")


def _reader(path: Path, head: bytes) -> Callable[[Path], dict[str, SourceTensor]]:
    """The function that reads the file, told by its first bytes and never by its name.

    Raises FormatError, with the reason where it is known, for a file that is no checkpoint.
    """
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
