"""Tools for threads that work together in compiled code: atomic integers by their address, locks, ways to wait.

Each of these is the typing half of a numba intrinsic; the signature's arguments are all int64.
"""
# ruff: noqa: ARG001

import platform
import sys
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

I32, I64 = ir.IntType(32), ir.IntType(64)
_ORDER = "seq_cst"
_YIELD = "SwitchToThread" if sys.platform == "win32" else "sched_yield"


def _place(b: Any, address: Any) -> Any:
    return b.inttoptr(address, I64.as_pointer())


def _external(b: Any, name: str, result: Any, values: list[Any]) -> Any:
    kind = ir.FunctionType(result, [value.type for value in values])
    return b.call(get_or_insert_function(b.module, kind, name), values)


def _load(typingctx, address):
    """The integer at `address`."""
    return types.int64(types.int64), lambda _c, b, _s, a: b.load_atomic(_place(b, a[0]), _ORDER, 8)


def _add(typingctx, address, value):
    """Add to the integer at `address`; what it was."""
    signature = types.int64(types.int64, types.int64)
    return signature, lambda _c, b, _s, a: b.atomic_rmw("add", _place(b, a[0]), a[1], _ORDER)


def _exchange(typingctx, address, value):
    """Set the integer at `address`; what it was."""
    signature = types.int64(types.int64, types.int64)
    return signature, lambda _c, b, _s, a: b.atomic_rmw("xchg", _place(b, a[0]), a[1], _ORDER)


def _pause(typingctx):
    """Tell the CPU that this is a loop that waits."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            _external(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif platform.machine() in ("aarch64", "arm64"):
            _external(b, "llvm.aarch64.hint", ir.VoidType(), [I32(1)])
        return context.get_dummy_value()

    return types.void(), generate


def _give_way(typingctx):
    """Let another thread have this core."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _external(b, _YIELD, I32, [])
        return context.get_dummy_value()

    return types.void(), generate


def _acquire(typingctx, lock):
    """Sleep until the lock is released, and take it (CPython's own locks, which need no interpreter)."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _external(b, "PyThread_acquire_lock", I32, [_place(b, args[0]), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _release(typingctx, lock):
    """Release the lock."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _external(b, "PyThread_release_lock", ir.VoidType(), [_place(b, args[0])])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _call(typingctx, address, args, part, parts):
    """Call the kernel at `address`."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
        b.call(b.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


def _pointer(typingctx, address):
    """The address as a pointer to int64, for `numba.carray`."""
    return types.CPointer(types.int64)(types.int64), lambda _c, b, _s, a: _place(b, a[0])


load: Any = intrinsic(_load)
add: Any = intrinsic(_add)
exchange: Any = intrinsic(_exchange)
pause: Any = intrinsic(_pause)
give_way: Any = intrinsic(_give_way)
acquire: Any = intrinsic(_acquire)
release: Any = intrinsic(_release)
call: Any = intrinsic(_call)
pointer: Any = intrinsic(_pointer)
