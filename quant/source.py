"""Checkpoints' files, which are opened once, and their tensors as places in them."""

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import FormatError
from rwkv_cli.quant.dtypes import BITS, to_float32
from rwkv_cli.quant.replacing import check_regular


class SourceFile:
    """A file that stays open until nobody needs it. So another file that gets its name is never mixed in."""

    def __init__(self, path: Path) -> None:
        """Raises FormatError for a device or a pipe, and OSError."""
        check_regular(path)
        self.path = path
        self.file = path.open("rb", buffering=0)
        """The open file. It has no buffer, so that a change to it is seen."""
        weakref.finalize(self, self.file.close)
        self._turn = threading.Lock()
        self._before = self._facts()

    def _facts(self) -> tuple[int, ...]:
        facts = os.fstat(self.file.fileno())
        return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self._before[2]

    def check(self) -> None:
        """Raise FormatError if the file is not what it was, or if its name is another file's by now."""
        try:
            named = self.path.stat()
        except OSError:
            named = None
        if self._facts() != self._before or named is None or (named.st_dev, named.st_ino) != self._before[:2]:
            raise self._changed()

    def _changed(self) -> FormatError:
        return FormatError(f"{self.path}: was changed or replaced while it was read; try again once it is whole")

    def read(self, start: int, into: NDArray[Any]) -> None:
        """Fill an array with the bytes from `start` on. Raises FormatError where the file has become shorter."""
        rest = into.reshape(-1).view(np.uint8).data
        with self._turn:
            self.file.seek(start)
            while rest:
                count = self.file.readinto(rest)
                if not count:
                    raise self._changed()
                rest = rest[count:]


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in a file. Nothing is read before `bits` or `float32` is called."""

    file: SourceFile
    dtype: str
    """A key of BITS."""
    shape: tuple[int, ...]
    start: int
    """The first byte of the first element, counted from the start of the file."""
    strides: tuple[int, ...]
    """Distances between neighbours along each axis, in elements. None is negative."""

    @property
    def path(self) -> Path:
        """The file's name."""
        return self.file.path

    @property
    def files(self) -> frozenset[SourceFile]:
        """Every file that its numbers come from."""
        return frozenset({self.file})

    @property
    def float_dtype(self) -> str:
        """The dtype of FLOAT_DTYPES that takes its values best."""
        return "F32" if self.dtype == "F64" else self.dtype

    @property
    def item_size(self) -> float:
        """Bytes of one number in the file. In blocks of numbers, it is a fraction."""
        return BITS[self.dtype].itemsize

    def bits(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows [start, stop) of the first axis, read-only."""
        kind = BITS[self.dtype]
        shape = self.shape
        offset = self.start
        if shape:
            stop = shape[0] if stop is None else min(stop, shape[0])
            shape = (stop - start, *shape[1:])
            offset += start * self.strides[0] * kind.itemsize
        if prod(shape) == 0:
            return np.empty(shape, kind)
        flat = np.empty(extent(shape, self.strides), kind)
        self.file.read(offset, flat)
        return np.lib.stride_tricks.as_strided(flat, shape, [s * kind.itemsize for s in self.strides], writeable=False)

    def float32(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """The same rows as float32, C-contiguous. They may be read-only."""
        return np.require(to_float32(self.bits(start, stop), self.dtype), requirements=["C", "A"])


@dataclass(frozen=True)
class Zeros(SourceTensor):
    """A tensor of zeros that a checkpoint leaves out. Its file is that of another tensor of the model."""

    @classmethod
    def beside(cls, other: SourceTensor, shape: tuple[int, ...]) -> "Zeros":
        """Zeros for the same model as `other`."""
        return cls(other.file, other.dtype, shape, 0, contiguous(shape))

    def bits(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        return np.zeros(self.shape, BITS[self.dtype])[start:stop]


@dataclass(frozen=True)
class Computed(SourceTensor):
    """A float32 tensor whose numbers are computed one by one from those of another."""

    of: SourceTensor
    function: Callable[[NDArray[np.float32]], NDArray[np.float32]]

    @classmethod
    def from_each(cls, of: SourceTensor, function: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> "Computed":
        """The tensor of `function` of each number of `of`."""
        return cls(of.file, "F32", of.shape, of.start, contiguous(of.shape), of, function)

    @property
    def item_size(self) -> float:
        return self.of.item_size

    def bits(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        return self.function(self.of.float32(start, stop))


@dataclass(frozen=True)
class Joined(SourceTensor):
    """Tensors of one dtype and file that make up another one."""

    parts: tuple[SourceTensor, ...]
    axis: int

    @classmethod
    def of(cls, parts: Sequence[SourceTensor], axis: int) -> "Joined":
        """These tensors one after the other along an axis."""
        first, length = parts[0], sum(part.shape[axis] for part in parts)
        shape = (*first.shape[:axis], length, *first.shape[axis + 1 :])
        return cls(first.file, first.dtype, shape, 0, contiguous(shape), tuple(parts), axis)

    def bits(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        return np.concatenate([part.bits() for part in self.parts], self.axis)[start:stop]


Source = Mapping[str, SourceTensor]


def reshaped(tensor: SourceTensor, shape: tuple[int, ...]) -> SourceTensor:
    """A contiguous tensor in another shape of as many numbers."""
    return replace(tensor, shape=shape, strides=contiguous(shape))


def turned(tensor: SourceTensor) -> SourceTensor:
    """The tensor with its last two axes swapped."""
    shape, strides = tensor.shape, tensor.strides
    return replace(tensor, shape=(*shape[:-2], *shape[:-3:-1]), strides=(*strides[:-2], *strides[:-3:-1]))


def rows_of(tensor: SourceTensor) -> list[SourceTensor]:
    """The parts of a stack: one tensor for each place on its first axis."""
    step = tensor.strides[0] * BITS[tensor.dtype].itemsize
    return [
        replace(tensor, shape=tensor.shape[1:], strides=tensor.strides[1:], start=tensor.start + i * step)
        for i in range(tensor.shape[0])
    ]


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a C-contiguous array."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The number of elements from the first to the last that a strided view touches, both included."""
    if prod(shape) == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


MAX_DIMENSIONS = 8
_MAX_NUMBERS = 1 << 48


def check_shape(path: Path, name: str, shape: Sequence[int]) -> None:
    """Refuse a shape that no weight has, empty ones included, before anything is computed from it."""
    if len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"{path}: tensor {name} has {len(shape)} dimensions, more than any weight; download it again")
    if prod(max(n, 1) for n in shape) > _MAX_NUMBERS:
        raise FormatError(
            f"{path}: tensor {name} has the shape {list(shape)}, larger than any weight; download it again"
        )


def check_name(path: Path, name: str) -> None:
    """Refuse a name that would break a message into lines."""
    if not name.isprintable():
        raise FormatError(f"{path}: a tensor has the name {name!a:.80}; download the file again")
