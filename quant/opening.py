"""Opens a foreign checkpoint: a `.pth`, a safetensors, GGUF or rwkv.cpp file, or a folder of the first two."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rwkv_cli.errors import FormatError
from rwkv_cli.quant import rwkv_cpp
from rwkv_cli.quant.gguf import MAGIC, open_gguf, read_gguf
from rwkv_cli.quant.pth import LEGACY, open_legacy, open_pth
from rwkv_cli.quant.safetensors import is_converted, open_safetensors
from rwkv_cli.quant.source import SourceFile, SourceTensor


def open_source(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of a checkpoint by its name there.

    Raises FormatError for anything that is not a readable checkpoint, OSError where the system refuses.
    """
    if path.is_dir():
        return _open_folder(path)
    part = re.search(r"-0*([0-9]+)-of-0*([0-9]+)\.(safetensors|bin|pth)$", path.name)
    if part and part[2] != "1":
        raise FormatError(f"{path}: part {part[1]} of {part[2]} of a model; give the folder with all of them")
    if re.search(r"zero_pp_rank_\d+_mp_rank_\d+_\w+_states\.pt$", path.name):
        raise FormatError(
            f"{path}: one part of a DeepSpeed checkpoint; gather all with `python zero_to_fp32.py . pytorch_model.bin` "
            "in the folder above, and convert that file"
        )
    if path.name.endswith(".index.json"):
        raise FormatError(f"{path}: the list of a model's parts; give the folder with all of them")
    return _open_file(path)


def _open_file(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of a file, which may be one of several parts."""
    file = SourceFile(path)
    return _reader(path, file.file.read(512))(file)


def read_settings(path: Path) -> dict[str, Any]:
    """The config.json of a checkpoint: of a folder, or beside a file with a name that only such folders have.

    The metadata of a GGUF file are its settings. Otherwise they are empty. Raises FormatError for a config.json that
    cannot be read.
    """
    if path.is_file():
        source = SourceFile(path)
        if source.file.read(len(MAGIC)) == MAGIC:
            return read_gguf(source).metadata
    folder = path if path.is_dir() else path.absolute().parent
    file = folder / "config.json"
    if not file.is_file() or not (
        path.is_dir() or re.match(r"(model.*\.safetensors|pytorch_model.*\.bin)$", path.name)
    ):
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise FormatError(f"{file}: not a readable JSON object; download it again")
    return {name: value for name, value in settings.items() if "." not in name}  # such names are GGUF's


def _open_folder(folder: Path) -> dict[str, SourceTensor]:
    """The tensors of a folder: those of all *.safetensors, else of all pytorch_model*.bin, else of the one *.pth.

    Converted files are left out.
    """
    if (folder / "zero_to_fp32.py").is_file() and not any(folder.glob("pytorch_model*.bin")):
        raise FormatError(
            f"{folder}: a DeepSpeed checkpoint whose weights are spread over files; gather them with "
            "`python zero_to_fp32.py . pytorch_model.bin` in that folder, and convert that file"
        )
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.pth"):
        files = [file for file in sorted(folder.glob(pattern)) if not is_converted(file)]
        if pattern == "*.pth" and len(files) > 1:
            raise FormatError(f"{folder}: holds {len(files)} .pth files; name the one to convert")
        if files:
            tensors: dict[str, SourceTensor] = {}
            for file in files:
                for name, tensor in _open_file(file).items():
                    if name in tensors:
                        raise FormatError(f"{file}: tensor {name} is also in {tensors[name].path.name}")
                    tensors[name] = tensor
            _check_shards(folder, f"{pattern}.index.json", tensors)
            if pattern != "*.pth":
                _check_alone(folder, files[0])
            return tensors
    raise FormatError(f"{folder}: no *.safetensors, pytorch_model*.bin or *.pth to convert in this folder")


def _check_alone(folder: Path, taken: Path) -> None:
    """Refuse a folder that also has a model in a *.pth, perhaps another one. Trainers keep other things there, too."""
    for file in sorted(folder.glob("*.pth")):
        try:
            names = list(_open_file(file))
        except FormatError:
            continue
        if any(name.endswith("emb.weight") for name in names):
            raise FormatError(f"{folder}: holds {taken.name} and {file.name}; name the one to convert")


def _check_shards(folder: Path, pattern: str, tensors: Mapping[str, SourceTensor]) -> None:
    """Refuse a folder if an index in it lists a shard that is not there. `pattern` matches the names of indices."""
    for index in sorted(folder.glob(pattern)):
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            missing = sorted({shard for name, shard in listed.items() if name not in tensors})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise FormatError(f"{index}: not a readable shard index; download it again") from None
        if missing:
            raise FormatError(f"{index}: tensors of shard {missing[0]} are missing from {folder}; download it again")


def _reader(path: Path, head: bytes) -> Callable[[SourceFile], dict[str, SourceTensor]]:
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
    if head.startswith(MAGIC):
        return open_gguf
    if head.startswith(rwkv_cpp.MAGIC):
        return rwkv_cpp.open_rwkv_cpp
    if head.startswith((rwkv_cpp.MAGIC[::-1], b"lmgg")):
        raise FormatError(f"{path}: a big-endian or very old file of ggml; convert from the original .pth instead")
    if head.startswith(LEGACY):
        return open_legacy
    if head.startswith(b"\x80"):
        raise FormatError(f"{path}: a pickle that torch.save did not write; give a checkpoint")
    raise FormatError(
        f"{path}: neither a torch .pth nor a safetensors or GGUF file; give a checkpoint, or download it again"
    )
