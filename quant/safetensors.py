"""Reads safetensors files. The library checks the header; this module adds where each tensor lies."""

from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rwkv_cli.errors import FormatError
from rwkv_cli.quant.dtypes import BITS, SOURCE_DTYPES
from rwkv_cli.quant.source import SourceFile, SourceTensor, check_name, check_shape, contiguous


def open_safetensors(file: SourceFile) -> dict[str, SourceTensor]:
    """Every tensor of a safetensors file of floats."""
    path = file.path
    tensors, text = read_header(file)
    if text.get("format") == "rwkv":
        raise FormatError(f"{path}: already converted; run it with -m, or convert from the original")
    for name, tensor in tensors.items():
        if tensor.dtype not in SOURCE_DTYPES:
            raise _no_float(path, name, tensor.dtype)
    return tensors


def is_safetensors(path: Path) -> bool:
    """Return true if the file begins as safetensors files do."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def is_converted(path: Path) -> bool:
    """Return true for a file that `rwkv convert` has written, whole or not."""
    try:
        return path.is_file() and is_safetensors(path) and read_header(SourceFile(path))[1].get("format") == "rwkv"
    except FormatError:
        return False


def read_header(file: SourceFile) -> tuple[dict[str, SourceTensor], dict[str, str]]:
    """The tensors and the metadata of a file. Raises FormatError where the header does not describe the file exactly.

    The format has no gaps (safetensors README, "Format"; enforced by `safe_open`), so offsets follow from the order.
    """
    path = file.path
    file.file.seek(0)
    start = 8 + int.from_bytes(file.file.read(8), "little")
    tensors: dict[str, SourceTensor] = {}
    try:
        with safe_open(path, "np") as opened:
            names: list[str] = opened.offset_keys()
            metadata: dict[str, str] = opened.metadata() or {}
            for name in names:
                check_name(path, name)
                view: Any = opened.get_slice(name)
                dtype, shape = view.get_dtype(), tuple(view.get_shape())
                if dtype not in BITS:
                    raise _no_float(path, name, dtype)
                check_shape(path, name, shape)
                tensors[name] = SourceTensor(file, dtype, shape, start, contiguous(shape))
                start += prod(shape) * BITS[dtype].itemsize
    except SafetensorError as error:
        raise FormatError(
            f"{path}: broken or truncated safetensors file ({error}); download or convert again"
        ) from None
    file.check()  # the library opened it by its name
    return tensors, metadata


def _no_float(path: Path, name: str, dtype: str) -> FormatError:
    hint = "" if dtype.startswith("F") else "; if the model is quantized, convert the original"
    return FormatError(f"{path}: tensor {name} is {dtype}; save it again as F32, F16 or BF16{hint}")
