"""How a kernel gets its arguments: a row of int64, written by `pack` and read by `unpack`.

A kernel declares its arguments as a NamedTuple whose fields have the kinds below:

    class LayerNormArgs(NamedTuple):
        x: F32_2        # a C-contiguous float32 array of two dimensions: its address and its shape
        eps: F32        # a number
        stride: Int     # an int64
        levels: Address # an array whose shape and strides the kernel knows otherwise

    @kernel(LayerNormArgs)
    def layer_norm(args: int, part: int, parts: int) -> None:
        a = unpack(args, LayerNormArgs)
        …                                   # a.x, a.eps

An array that may be missing is passed as None: its address and its shape are then 0.
"""

import functools
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple, get_type_hints

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array
from numpy.typing import NDArray

from rwkv_cli.kernels.memory import Buffer
from rwkv_cli.kernels.program import Count, Input, InputMatrix

I64 = ir.IntType(64)

_ELEMENTS: dict[str, tuple[Any, np.dtype[Any]]] = {
    "F32": (types.float32, np.dtype(np.float32)),
    "F64": (types.float64, np.dtype(np.float64)),
    "BOOL": (types.uint8, np.dtype(np.bool_)),
    "I8": (types.int8, np.dtype(np.int8)),
    "U8": (types.uint8, np.dtype(np.uint8)),
    "I16": (types.int16, np.dtype(np.int16)),
    "U16": (types.uint16, np.dtype(np.uint16)),
    "I32": (types.int32, np.dtype(np.int32)),
    "U32": (types.uint32, np.dtype(np.uint32)),
    "I64": (types.int64, np.dtype(np.int64)),
    "U64": (types.uint64, np.dtype(np.uint64)),
}


class Kind(NamedTuple):
    """The kind of one argument: an array of some dimensions, an address, an int64 or a float32."""

    what: str
    element: str = ""
    dimensions: int = 0

    @property
    def numba_type(self) -> Any:
        """The type that a kernel sees."""
        if self.what == "array":
            return types.Array(_ELEMENTS[self.element][0], self.dimensions, "C")
        return types.float32 if self.what == "float" else types.int64


Int = Annotated[int | Count, Kind("int")]
F32 = Annotated[float, Kind("float")]
Address = Annotated[Any, Kind("address")]
F32_1 = Annotated[Any, Kind("array", "F32", 1)]
F32_2 = Annotated[Any, Kind("array", "F32", 2)]
F32_3 = Annotated[Any, Kind("array", "F32", 3)]
F32_4 = Annotated[Any, Kind("array", "F32", 4)]
F32_5 = Annotated[Any, Kind("array", "F32", 5)]
F64_1 = Annotated[Any, Kind("array", "F64", 1)]
F64_2 = Annotated[Any, Kind("array", "F64", 2)]
BOOL_2 = Annotated[Any, Kind("array", "BOOL", 2)]
U8_2 = Annotated[Any, Kind("array", "U8", 2)]
U8_3 = Annotated[Any, Kind("array", "U8", 3)]
I8_2 = Annotated[Any, Kind("array", "I8", 2)]
I8_3 = Annotated[Any, Kind("array", "I8", 3)]
I8_4 = Annotated[Any, Kind("array", "I8", 4)]
I16_3 = Annotated[Any, Kind("array", "I16", 3)]
I16_4 = Annotated[Any, Kind("array", "I16", 4)]
U16_2 = Annotated[Any, Kind("array", "U16", 2)]
U16_3 = Annotated[Any, Kind("array", "U16", 3)]
I32_1 = Annotated[Any, Kind("array", "I32", 1)]
U32_2 = Annotated[Any, Kind("array", "U32", 2)]
I64_1 = Annotated[Any, Kind("array", "I64", 1)]
I64_2 = Annotated[Any, Kind("array", "I64", 2)]
U64_1 = Annotated[Any, Kind("array", "U64", 1)]


@functools.cache
def kinds_of(record: type[NamedTuple]) -> list[Kind]:
    """The kind of each field of a record of arguments."""
    hints = get_type_hints(record, include_extras=True)
    return [hints[name].__metadata__[0] for name in record._fields]


class View(NamedTuple):
    """An array that a run will have: where it begins in a buffer or an input, and its shape and type."""

    base: Buffer | Input | InputMatrix
    shape: tuple[int | Count, ...]
    dtype: np.dtype[Any]
    offset: int = 0
    """Bytes."""


class Packed(NamedTuple):
    """A row of arguments, with what is not known before a run, or before memory is planned, by its place in the row."""

    slots: list[int]
    views: list[tuple[int, View]]
    """Addresses to fill in."""
    counts: list[tuple[int, Count]]
    """Numbers of rows to fill in."""
    arrays: list[NDArray[Any]]
    """Arrays of which only the address is in the row: whoever keeps the row keeps them alive."""


def pack(record: NamedTuple) -> Packed:
    """The row for a record of arguments. Raises TypeError for an array that is not of its field's kind."""
    row = Packed([], [], [], [])
    for kind, value in zip(kinds_of(type(record)), record, strict=True):
        if kind.what == "float":
            row.slots.append(int.from_bytes(struct.pack("f", value), sys.byteorder))
        elif kind.what == "int":
            _pack_sizes(row, (value,))
        elif value is None:
            row.slots.extend([0] * (1 + kind.dimensions))
        else:
            if kind.what == "array":
                _check(kind, value)
            if isinstance(value, View):
                row.views.append((len(row.slots), value))
                row.slots.append(0)
            else:
                row.arrays.append(value)
                row.slots.append(value.ctypes.data)
            if kind.what == "array":
                _pack_sizes(row, value.shape)
    return row


def _pack_sizes(row: Packed, sizes: Sequence[int | Count]) -> None:
    for size in sizes:
        if isinstance(size, Count):
            row.counts.append((len(row.slots), size))
            row.slots.append(0)
        else:
            row.slots.append(int(size))


def _check(kind: Kind, value: Any) -> None:
    dtype = _ELEMENTS[kind.element][1]
    contiguous = isinstance(value, View) or value.flags.c_contiguous
    if value.dtype != dtype or len(value.shape) != kind.dimensions or not contiguous:
        raise TypeError(f"{dtype} of {kind.dimensions} dimensions expected, not {value.dtype} of {value.shape}")


def _unpack(typingctx, args, record):  # noqa: ARG001
    """The arguments at address `args`, as the NamedTuple `record`."""
    kinds = [kind.numba_type for kind in kinds_of(record.instance_class)]
    result = types.BaseTuple.from_types(kinds, record.instance_class)

    def generate(context: Any, b: Any, signature: Any, operands: Any) -> Any:  # noqa: ARG001
        base = b.inttoptr(operands[0], I64.as_pointer())
        slots = _loaded(b, base)
        return context.make_tuple(b, result, [_argument(context, b, kind, slots) for kind in kinds])

    return result(types.int64, record), generate


def _loaded(b: Any, base: Any) -> Iterator[Any]:
    """Each slot of the row at pointer `base`, as the code that loads it."""
    at = 0
    while True:
        yield b.load(b.gep(base, [I64(at)]))
        at += 1


def _argument(context: Any, b: Any, kind: Any, slots: Iterator[Any]) -> Any:
    """The code for one argument, from the slots that it takes."""
    if kind == types.float32:
        return b.bitcast(b.trunc(next(slots), ir.IntType(32)), ir.FloatType())
    if not isinstance(kind, types.Array):
        return next(slots)
    data, shape = next(slots), [next(slots) for _ in range(kind.ndim)]
    element = context.get_data_type(kind.dtype)
    size = I64(context.get_abi_sizeof(element))
    strides = [size]
    for n in reversed(shape[1:]):
        strides.insert(0, b.mul(strides[0], n))
    array = make_array(kind)(context, b)
    pointer = b.inttoptr(data, element.as_pointer())
    populate_array(array, data=pointer, shape=shape, strides=strides, itemsize=size, meminfo=None)
    return array._getvalue()


unpack: Any = intrinsic(_unpack)
