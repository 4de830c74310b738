"""Arrays in the GPU's memory, which behave as numpy's do as far as states need it."""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.cuda.driver import Block, download, move, upload

Index = int | slice | None


class Flags(NamedTuple):
    c_contiguous: bool
    writeable: bool = True


class DeviceArray:
    """A view of a block: shape, strides in bytes, dtype. Basic indexing gives views, `copy` a block of its own."""

    def __init__(
        self,
        block: Any,
        shape: tuple[int, ...],
        dtype: Any = np.float32,
        offset: int = 0,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        self.block, self.offset = block, offset
        self.shape, self.dtype = tuple(map(int, shape)), np.dtype(dtype)
        self.strides = contiguous(self.shape, self.dtype.itemsize) if strides is None else strides

    @classmethod
    def of(cls, values: NDArray[Any]) -> "DeviceArray":
        """A copy of an array that the host has."""
        array = cls(Block(values.nbytes), values.shape, values.dtype)
        upload(array.address, np.ascontiguousarray(values))
        return array

    @property
    def address(self) -> int:
        address: int = self.block.address + self.offset
        return address

    @property
    def nbytes(self) -> int:
        size: int = prod(self.shape) * self.dtype.itemsize
        return size

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def flags(self) -> Flags:
        wanted = contiguous(self.shape, self.dtype.itemsize)
        return Flags(all(n == 1 or a == b for n, a, b in zip(self.shape, self.strides, wanted, strict=True)))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index | tuple[Index, ...]) -> "DeviceArray":
        """A view. An index may be an integer, a slice with step 1, or None."""
        offset, shape, strides = self.offset, list[int](), list[int]()
        dims = iter(zip(self.shape, self.strides, strict=True))
        for part in index if isinstance(index, tuple) else (index,):
            if part is None:
                shape.append(1)
                strides.append(0)
                continue
            size, stride = next(dims)
            if isinstance(part, slice):
                start, stop, step = part.indices(size)
                if step != 1:
                    raise IndexError("only slices with step 1")
                offset += start * stride
                shape.append(max(0, stop - start))
                strides.append(stride)
            else:
                if not -size <= part < size:
                    raise IndexError(f"index {part} of {size}")
                offset += part % size * stride
        for size, stride in dims:
            shape.append(size)
            strides.append(stride)
        return DeviceArray(self.block, tuple(shape), self.dtype, offset, tuple(strides))

    def __setitem__(self, index: Index | tuple[Index, ...], values: Any) -> None:
        target = self[index]
        source = np.broadcast_to(np.asarray(values, self.dtype), target.shape)
        for at, part in zip(target._runs(), _pieces(source, target), strict=True):
            upload(at, np.ascontiguousarray(part))

    def _runs(self) -> Iterator[int]:
        """Addresses of this array's contiguous pieces, in order."""
        if self.flags.c_contiguous:
            yield self.address
        else:
            for i in range(len(self)):
                yield from self[i]._runs()

    def copy(self) -> "DeviceArray":
        """A contiguous copy in a block of its own."""
        out = DeviceArray(Block(self.nbytes), self.shape, self.dtype)
        self._copy_to(out)
        return out

    def _copy_to(self, out: "DeviceArray") -> None:
        """Copy this array into another of the same shape."""
        if self.flags.c_contiguous and out.flags.c_contiguous:
            move(out.address, self.address, self.nbytes)
        else:
            for i in range(len(self)):
                self[i]._copy_to(out[i])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        out = np.empty(self.shape, self.dtype)
        here = self if self.flags.c_contiguous else self.copy()
        download(out, here.address)
        return out if dtype is None else out.astype(dtype, copy=False)

    def tobytes(self) -> bytes:
        return np.asarray(self).tobytes()

    def __array_function__(self, function: Callable[..., Any], _types: Any, args: Any, options: Any) -> Any:
        """Do np.stack on the device. Any other function of numpy's gets copies on the host."""
        if function is np.stack:
            return _stack(*args, **options)
        return function(*map(_host, args), **options)


def contiguous(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Strides in bytes of a C-contiguous array."""
    return tuple(size * prod(shape[i + 1 :]) for i in range(len(shape)))


def _pieces(values: NDArray[Any], like: DeviceArray) -> Iterator[NDArray[Any]]:
    """The part of `values` for each of the contiguous pieces of `like`."""
    if like.flags.c_contiguous:
        yield values
    else:
        for i in range(len(values)):
            yield from _pieces(values[i], like[i])


def _host(value: Any) -> Any:
    if isinstance(value, DeviceArray):
        return np.asarray(value)
    return type(value)(map(_host, value)) if isinstance(value, list | tuple) else value


def _stack(arrays: Any, axis: int = 0) -> DeviceArray:
    """Do what np.stack does, on the device."""
    arrays = [array if isinstance(array, DeviceArray) else DeviceArray.of(array) for array in arrays]
    first = arrays[0]
    shape = (*first.shape[:axis], len(arrays), *first.shape[axis:])
    out = DeviceArray(Block(first.nbytes * len(arrays)), shape, first.dtype)
    before = (slice(None),) * axis
    for i, array in enumerate(arrays):
        array._copy_to(out[(*before, i)])
    return out
