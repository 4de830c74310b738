"""How a kernel gets its arguments: a row of int64, written by `pack` and read by `unpack`, both by one spec.

A spec names kinds, separated by blanks: `f32.2` is a C-contiguous float32 array of two dimensions (slots: address and
shape), `f32` a number, `int` an int64, `at` the address of an array whose shape and strides the kernel knows otherwise.
An array that may be missing (None) is passed as address 0 and shape 0.
"""

import struct
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

KINDS: dict[str, tuple[Any, np.dtype[Any]]] = {
    "f32": (types.float32, np.dtype(np.float32)), "f64": (types.float64, np.dtype(np.float64)),
    "i8": (types.int8, np.dtype(np.int8)), "u8": (types.uint8, np.dtype(np.bool_)),
    "i16": (types.int16, np.dtype(np.int16)), "u16": (types.uint16, np.dtype(np.uint16)),
    "i32": (types.int32, np.dtype(np.int32)), "u32": (types.uint32, np.dtype(np.uint32)),
    "i64": (types.int64, np.dtype(np.int64)), "u64": (types.uint64, np.dtype(np.uint64)),
}  # fmt: skip

I64 = ir.IntType(64)


class Slot(NamedTuple):
    """What one argument of a kernel is."""

    kind: str
    dimensions: int
    dtype: np.dtype[Any] | None


def parse(spec: str) -> list[Slot]:
    """The arguments that a spec names."""
    slots = []
    for kind in spec.split():
        name, _, ndim = kind.partition(".")
        slots.append(Slot("array" if ndim else kind, int(ndim or 0), KINDS[name][1] if ndim else None))
    return slots


def pack(spec: Sequence[Slot], values: Sequence[Any]) -> tuple[list[int], list[tuple[int, int, Any]]]:
    """The slots, and which of them hold addresses, these, and of which arrays. Raises TypeError for what is not as
    specified."""
    slots: list[int] = []
    arrays: list[tuple[int, int, Any]] = []
    for (kind, dimensions, dtype), value in zip(spec, values, strict=True):
        if kind == "int":
            slots.append(int(value))
        elif kind == "f32":
            slots.append(int.from_bytes(struct.pack("f", value), sys.byteorder))
        elif value is None:
            slots += [0] * (1 + dimensions)
        else:
            address = value.ctypes.data
            arrays.append((len(slots), address, value))
            slots.append(address)
            if kind == "array":
                if value.dtype != dtype or value.ndim != dimensions or not value.flags.c_contiguous:
                    raise TypeError(f"{dtype} of {dimensions} dimensions expected, not {value.dtype} of {value.shape}")
                slots += value.shape
    return slots, arrays


def _unpack(typingctx, args, spec):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """The arguments at address `args`, as a tuple."""
    if not isinstance(spec, types.StringLiteral):
        raise numba.errors.TypingError("a spec must be a constant")
    kinds: list[Any] = []
    for kind in spec.literal_value.split():
        name, _, ndim = kind.partition(".")
        kinds.append(
            types.Array(KINDS[name][0], int(ndim), "C") if ndim else {"f32": types.float32}.get(name, types.int64)
        )
    result = types.Tuple(kinds)

    def generate(context: Any, b: Any, signature: Any, operands: Any) -> Any:  # noqa: ARG001
        base, at, values = b.inttoptr(operands[0], I64.as_pointer()), 0, []

        def following() -> Any:
            nonlocal at
            at += 1
            return b.load(b.gep(base, [I64(at - 1)]))

        for kind in kinds:
            if isinstance(kind, types.Array):
                data, shape = following(), [following() for _ in range(kind.ndim)]
                element = context.get_data_type(kind.dtype)
                size = I64(context.get_abi_sizeof(element))
                strides = [size]
                for n in reversed(shape[1:]):
                    strides.insert(0, b.mul(strides[0], n))
                array = make_array(kind)(context, b)
                pointer = b.inttoptr(data, element.as_pointer())
                populate_array(array, data=pointer, shape=shape, strides=strides, itemsize=size, meminfo=None)
                values.append(array._getvalue())
            elif kind == types.float32:
                values.append(b.bitcast(b.trunc(following(), ir.IntType(32)), ir.FloatType()))
            else:
                values.append(following())
        return context.make_tuple(b, result, values)

    return result(types.int64, spec), generate


unpack: Any = intrinsic(prefer_literal=True)(_unpack)
