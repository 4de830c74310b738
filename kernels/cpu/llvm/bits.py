"""A float32, its bits and its place, inside a kernel."""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic


def _bits_of(typingctx, x):  # noqa: ARG001
    """The bits of a float32 as int32."""
    return types.int32(types.float32), lambda _context, b, _signature, args: b.bitcast(args[0], ir.IntType(32))


def _float_of(typingctx, bits):  # noqa: ARG001
    """The float32 that has these bits (int32)."""
    return types.float32(types.int32), lambda _context, b, _signature, args: b.bitcast(args[0], ir.FloatType())


def _float_at(typingctx, address):  # noqa: ARG001
    """The float32 at an address (int64)."""
    return types.float32(types.int64), lambda _context, b, _signature, args: b.load(
        b.inttoptr(args[0], ir.FloatType().as_pointer())
    )


bits_of: Any = intrinsic(_bits_of)
float_at: Any = intrinsic(_float_at)
float_of: Any = intrinsic(_float_of)
