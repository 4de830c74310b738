"""Tensors as ggml stores them in GGUF and rwkv.cpp files: rows of floats, or rows of blocks of quantized numbers.

The `gguf` package of llama.cpp's authors says how large blocks are, and reads them.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import FormatError
from rwkv_cli.quant.dtypes import SOURCE_DTYPES
from rwkv_cli.quant.source import SourceFile, SourceTensor, check_name, contiguous, extent

_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
"""The kinds of quantized tensors that are read."""


class Fields:
    """The numbers and texts at the beginning of a file, read one after the other. All are little-endian."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self._file = path, file
        self.size = path.stat().st_size
        self.at = file.tell()

    @property
    def left(self) -> int:
        """The bytes that have not been read."""
        return self.size - self.at

    def take(self, count: int) -> bytes:
        """Read so many bytes. Raises FormatError if the file ends before."""
        if count > self.left:
            raise self.truncated()
        self.at += count
        return self._file.read(count)

    def skip(self, count: int) -> None:
        """Go on behind so many bytes."""
        if count > self.left:
            raise self.truncated()
        self.at += count
        self._file.seek(self.at)

    def number(self, code: str) -> Any:
        """Read a number of one of the codes of `struct`."""
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return value

    def text(self, code: str) -> str:
        """Read a text and, before it, its length in bytes. Bytes that are not UTF-8 become surrogates (PEP 383)."""
        return self.take(self.number(code)).decode("utf-8", "surrogateescape")

    def truncated(self) -> FormatError:
        """The error of a file that is shorter than it says."""
        return FormatError(f"{self.path}: the file is truncated or damaged; download it again")


@dataclass(frozen=True)
class Blocks(SourceTensor):
    """A tensor of quantized blocks along its last axis. `start` is that of the first block, and numbers are float32."""

    kind: str
    """One of _BLOCKS."""

    @property
    def item_size(self) -> float:
        numbers, size = block_of(self.kind)
        return size / numbers

    def bits(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        rows = self.shape[0]
        stop = rows if stop is None else min(stop, rows)
        if self.strides == contiguous(self.shape):
            each = prod(self.shape[1:])
            return self._numbers(start * each, stop * each).reshape(stop - start, *self.shape[1:])
        whole = self._numbers(0, extent(self.shape, self.strides))
        return np.lib.stride_tricks.as_strided(whole, self.shape, [4 * s for s in self.strides])[start:stop]

    def _numbers(self, first: int, last: int) -> NDArray[np.float32]:
        """The numbers [first, last) in the order of the file. Both are borders of blocks."""
        from gguf import GGMLQuantizationType, dequantize

        if first == last:
            return np.empty(0, np.float32)
        numbers, size = block_of(self.kind)
        begin, count = first // numbers * size, (last - first) // numbers
        raw = np.empty((count, size), np.uint8)
        self.file.read(self.start + begin, raw)
        with np.errstate(over="ignore", invalid="ignore"):  # conversion refuses what is no number
            return dequantize(raw, GGMLQuantizationType[self.kind]).reshape(-1)


def block_of(kind: str) -> tuple[int, int]:
    """How many numbers a block has, and how many bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def kind_name(number: int) -> str:
    """The name of a kind of tensors, told by its number in ggml."""
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"of the unknown type {number}"


def tensor_bytes(path: Path, name: str, kind: str, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor in the file. Raises FormatError for a kind or a shape that no tensor can have."""
    check_name(path, name)
    if kind not in (*SOURCE_DTYPES, *_BLOCKS):
        raise FormatError(f"{path}: tensor {name} is {kind}, which is not read; take a file in F16, Q8_0 or Q4_K")
    numbers, size = block_of(kind)
    if not 1 <= len(shape) <= 4 or prod(shape) == 0 or shape[-1] % numbers:
        raise FormatError(f"{path}: tensor {name} has the shape {list(shape)}; download the file again")
    return prod(shape) // numbers * size


def tensor_at(file: SourceFile, kind: str, shape: tuple[int, ...], start: int) -> SourceTensor:
    """The tensor that begins at the byte `start`."""
    if kind in SOURCE_DTYPES:
        return SourceTensor(file, kind, shape, start, contiguous(shape))
    return Blocks(file, "F32", shape, start, contiguous(shape), kind)
