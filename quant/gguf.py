"""Reads the header of GGUF files (ggml, docs/gguf.md): metadata, and where each tensor lies.

The reader of the `gguf` package makes several objects of each token and trusts every number in the file. This one is
held to it by a test.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_cli.errors import FormatError
from rwkv_cli.quant.ggml import Fields, kind_name, tensor_at, tensor_bytes
from rwkv_cli.quant.source import SourceFile, SourceTensor

MAGIC = b"GGUF"

_MOST_METADATA = 32 << 20
"""Bytes of the longest metadata. They take up to nine times as much memory. Real vocabularies have less than 8 MB."""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The codes in `struct` of the types of metadata."""

_FLOAT32, _TEXT, _ARRAY = 6, 8, 9
"""Further types of metadata."""


class Gguf(NamedTuple):
    """A GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, SourceTensor]
    """Tensors by their names there. Shapes are NumPy's, which are ggml's turned round."""


def read_gguf(source: SourceFile) -> Gguf:
    """The metadata and the tensors of a GGUF file. Raises FormatError for one that is damaged or of another kind."""
    path = source.path
    with path.open("rb") as file:
        fields = Fields(path, file)
        fields.skip(len(MAGIC))
        version = fields.number("I")
        if version & 0xFFFF == 0:
            raise FormatError(f"{path}: a big-endian GGUF file, which is not read; take the little-endian one")
        if version not in (2, 3):
            raise FormatError(f"{path}: a GGUF file of version {version}; versions 2 and 3 are read: take a newer file")
        tensor_count, field_count = fields.number("Q"), fields.number("Q")
        if 24 * tensor_count + 13 * field_count > fields.left:  # the least that each takes
            raise fields.truncated()
        metadata: dict[str, Any] = {}
        for _ in range(field_count):
            key = fields.text("Q")
            metadata[key] = _value(fields, fields.number("I"))
            if fields.at > _MOST_METADATA:
                raise _too_long(path)
        _check_whole(path, metadata)
        entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for _ in range(tensor_count):
            name, dimensions = fields.text("Q"), fields.number("I")
            if dimensions > 4 or name in entries:
                raise fields.truncated()
            shape = tuple(fields.number("Q") for _ in range(dimensions))[::-1]
            entries[name] = (kind_name(fields.number("I")), shape, fields.number("Q"))
    source.check()  # it was opened a second time, with a buffer
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise FormatError(f"{path}: general.alignment is {alignment!r:.40}; download the file again")
    first = -(-fields.at // alignment) * alignment
    tensors, total = {}, first
    for name, (kind, shape, offset) in entries.items():
        size = tensor_bytes(path, name, kind, shape)
        if first + offset + size > fields.size:
            raise FormatError(f"{path}: tensor {name} lies beyond the end: the file is truncated; download it again")
        tensors[name] = tensor_at(source, kind, shape, first + offset)
        total += size
    if total > fields.size:
        raise FormatError(f"{path}: its tensors lie over each other; download the file again")
    return Gguf(metadata, tensors)


def open_gguf(file: SourceFile) -> dict[str, SourceTensor]:
    """Every tensor of a GGUF file."""
    return read_gguf(file).tensors


def _value(fields: Fields, kind: int) -> Any:
    """The value of a type."""
    if kind == _TEXT:
        return fields.text("Q")
    if kind == _FLOAT32:  # the shortest decimal number that has these bits: 1e-5, not 9.99999974e-6
        return float(str(np.float32(fields.number("f"))))
    if kind in _NUMBERS:
        return fields.number(_NUMBERS[kind])
    if kind != _ARRAY:
        raise FormatError(f"{fields.path}: metadata of an unknown type {kind}; download the file again")
    each, count = fields.number("I"), fields.number("Q")
    if fields.at + count > _MOST_METADATA:
        raise _too_long(fields.path)
    if each == _TEXT:
        if 8 * count > fields.left:
            raise fields.truncated()
        return [fields.text("Q") for _ in range(count)]
    if each not in _NUMBERS:
        raise FormatError(f"{fields.path}: metadata in lists of an unknown type {each}; download the file again")
    kind_ = np.dtype("<" + _NUMBERS[each])
    return np.frombuffer(fields.take(count * kind_.itemsize), kind_).tolist()


def _too_long(path: Path) -> FormatError:
    return FormatError(f"{path}: its metadata is longer than any model's; download the file again")


def _check_whole(path: Path, metadata: dict[str, Any]) -> None:
    """Refuse one part of several."""
    count = metadata.get("split.count", 1)
    if type(count) is int and count > 1:
        raise FormatError(
            f"{path}: one of {count} parts of a model; join them with `llama-gguf-split --merge` and convert the whole"
        )
