"""How a kernel's function is made of the code that it stands for."""

import functools
from collections.abc import Callable
from typing import Any

import numba.cuda
from llvmlite import ir
from numba.cuda.core import targetconfig
from numba.cuda.extending import intrinsic

types: Any = numba.cuda.types
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
FOUR, FOUR_FLOATS = types.UniTuple(types.int32, 4), types.UniTuple(types.float32, 4)
"""Types of what four registers hold."""


def emits(result: Any, *given: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: make a kernel's function of one that emits its code.

    The decorated function gets an IR builder and the arguments, which have the types `given`. It returns what the
    kernel's function returns, which is of type `result`: nothing, one value, or a list for a tuple.
    """

    def make(emit: Callable[..., Any]) -> Any:
        @functools.wraps(emit)  # numba reads how many arguments there are
        def typed(typingctx: Any, *arguments: Any) -> Any:  # noqa: ARG001
            def generate(context: Any, b: Any, signature: Any, operands: Any) -> Any:  # noqa: ARG001
                made = emit(b, *operands)
                if isinstance(result, types.UniTuple):
                    return context.make_tuple(b, result, made)
                return context.get_dummy_value() if result == types.void else made

            return result(*given), generate

        return intrinsic(typed)

    return make


def capability() -> tuple[int, int]:
    """The compute capability that is compiled for."""
    compiled_for: tuple[int, int] = targetconfig.ConfigStack().top().compute_capability
    return compiled_for


def volatile(b: Any, text: str, constraints: str, *operands: Any) -> None:
    """An instruction with no result. No load or store is moved from one side of it to the other."""
    kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
    constraints = ",".join(filter(None, [constraints, "~{memory}"]))
    b.call(ir.InlineAsm(kind, text, constraints, side_effect=True), list(operands))
