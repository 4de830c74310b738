"""Reads rwkv.cpp's files (docs/FILE_FORMAT.md there), and brings their tensors to the official form.

Names are the official ones. Some tensors are turned, stacked or computed: python/convert_pytorch_to_ggml.py there.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import FormatError
from rwkv_cli.quant.dtypes import SOURCE_DTYPES
from rwkv_cli.quant.ggml import Blocks, Fields, tensor_at, tensor_bytes
from rwkv_cli.quant.source import Computed, SourceFile, SourceTensor, reshaped, rows_of, turned

MAGIC = b"fmgg"
"""The number "ggmf", little-endian."""

_KINDS = (
    *("F32", "F16", "Q4_0", "Q4_1", "Q4_1_O", "Q4_2", "Q4_3", "Q5_0"),
    *("Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
"""The kinds of tensors by their numbers there."""

_FIRST_VERSION, _VERSION = 100, 101
"""Versions of the format. They differ in the blocks of quantized numbers. Those of the second are ggml's of today."""


def open_rwkv_cpp(file: SourceFile) -> dict[str, SourceTensor]:
    """Every tensor of an rwkv.cpp file, as it is officially."""
    stored = _read(file)
    version = 4 if "blocks.0.att.ln_x.weight" not in stored else 6 if "blocks.0.att.time_maa_x" in stored else 5
    return {
        name: official
        for stored_name, tensor in stored.items()
        for name, official in _official(version, stored_name, tensor)
    }


def _read(source: SourceFile) -> dict[str, SourceTensor]:
    """The tensors as they are stored. Raises FormatError for a file that is damaged or of another kind."""
    path = source.path
    with path.open("rb") as file:
        fields = Fields(path, file)
        fields.skip(len(MAGIC))
        version, vocab, width = (fields.number("I") for _ in range(3))
        if version not in (_FIRST_VERSION, _VERSION):
            raise FormatError(f"{path}: an rwkv.cpp file of version {version}; versions 100 and 101 are read")
        layers, _ = fields.number("I"), fields.number("I")
        tensors: dict[str, SourceTensor] = {}
        while fields.left:
            dimensions, length, number = (fields.number("I") for _ in range(3))
            if not 1 <= dimensions <= 3 or length > 1000:
                raise fields.truncated()
            shape = tuple(fields.number("I") for _ in range(dimensions))[::-1]
            name = fields.take(length).decode("utf-8", "surrogateescape")
            kind = _KINDS[number] if number < len(_KINDS) else f"of the unknown type {number}"
            size = tensor_bytes(path, name, kind, shape)
            if version == _FIRST_VERSION and kind not in SOURCE_DTYPES:
                raise FormatError(
                    f"{path}: tensor {name} is {kind} of version 100, which is not read; quantize the model again with "
                    "a newer rwkv.cpp, or take its FP16 file"
                )
            if name in tensors:
                raise FormatError(f"{path}: tensor {name} is there twice; download the file again")
            tensors[name] = tensor_at(source, kind, shape, fields.at)
            fields.skip(size)
    source.check()  # it was opened a second time, with a buffer
    emb = tensors.get("emb.weight")
    found = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    if emb is None or emb.shape != (vocab, width) or layers != found:
        raise FormatError(f"{path}: its header does not fit its tensors: the file is truncated; download it again")
    return tensors


def _official(version: int, name: str, tensor: SourceTensor) -> Iterator[tuple[str, SourceTensor]]:
    """The official tensors that a stored one stands for. `version` is 4, 5 or 6; v7 has none of what differs."""
    if name.endswith(".att.x_rwkvag"):
        if isinstance(tensor, Blocks) or tensor.shape[0] != len("rwkvag"):
            raise FormatError(f"{tensor.path}: tensor {name} does not hold six mixes; download the file again")
        for x, part in zip("rwkvag", rows_of(tensor), strict=True):
            yield name.removesuffix("rwkvag") + x, part
    elif re.search(r"\.att\.(time_maa_w[12]|time_decay_w[12]|[wavg][12])$", name) and len(tensor.shape) > 1:
        yield name, turned(tensor)
    elif re.search(r"\.att\.time_(decay|first|faaaa)$", name):
        yield name, _head_vector(version, name, tensor)
    else:
        yield name, tensor


def _head_vector(version: int, name: str, tensor: SourceTensor) -> SourceTensor:
    """The decay or the bonus. From v5 on they are [heads, channels, 1], and a single head is left out."""
    if isinstance(tensor, Blocks):
        raise FormatError(f"{tensor.path}: tensor {name} is quantized, which rwkv.cpp does not do; convert it again")
    if len(tensor.shape) > 1:
        heads, channels, one = (1, *tensor.shape)[-3:]
        if one != 1:
            raise FormatError(f"{tensor.path}: tensor {name} has the shape {list(tensor.shape)}; download it again")
        decay_of_6 = version == 6 and name.endswith("decay")
        tensor = reshaped(tensor, (heads * channels,) if decay_of_6 else (heads, channels))
    if version == 4 and name.endswith("decay"):  # −exp(t)
        return Computed.from_each(tensor, lambda a: _log(-a).astype(np.float32))
    if version == 5 and name.endswith("decay"):  # exp(−exp(t))
        return Computed.from_each(tensor, lambda a: _log(-_log(a)).astype(np.float32))
    if version == 5 and name.endswith("first"):  # exp(t)
        return Computed.from_each(tensor, lambda a: _log(a).astype(np.float32))
    return tensor


def _log(a: NDArray[Any]) -> NDArray[np.float64]:
    """The logarithm, whose bounds stand for numbers that float32 has rounded to 0 or to 1."""
    with np.errstate(divide="ignore", invalid="ignore"):  # conversion refuses what is NaN
        return np.clip(np.log(a.astype(np.float64)), -110, 110)
