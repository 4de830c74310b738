"""LLVM code for the inner loops of the matrix-valued recurrences: some columns of a head's state, all keys, one token.

What is summed over keys stays in registers, one lane a column, and is summed key by key: no horizontal sums, and the
same order whatever the width of a CPU's vectors.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

I64, F32 = ir.IntType(64), ir.FloatType()
_FMA = ("contract",)


class _Keys:
    """A loop over the keys i < N, in which sums of `width` columns are carried."""

    def __init__(self, builder: Any, width: int, N: Any) -> None:
        self.b, self.kind, self.N = builder, ir.VectorType(F32, width), N

    def row(self, address: Any) -> Any:
        value = self.b.load(self.b.inttoptr(address, self.kind.as_pointer()))
        value.align = 4
        return value

    def store(self, value: Any, address: Any) -> None:
        self.b.store(value, self.b.inttoptr(address, self.kind.as_pointer())).align = 4

    def each(self, base: Any, i: Any) -> Any:
        """Number i of those at `base`, in every lane."""
        scalar = self.b.load(self.b.inttoptr(self.b.add(base, self.b.mul(i, I64(4))), F32.as_pointer()))
        one = self.b.insert_element(ir.Constant(self.kind, ir.Undefined), scalar, ir.IntType(32)(0))
        return self.b.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), self.kind.count), None))

    def multiply(self, x: Any, y: Any) -> Any:
        return self.b.fmul(x, y, flags=_FMA)

    def add(self, x: Any, y: Any) -> Any:
        return self.b.fadd(x, y, flags=_FMA)

    def sum(self, body: Callable[[Any, Any, Any], Any], S: Any) -> Any:
        """What body(i, address of row i, sum so far) makes of a sum that begins with 0; N is at least 1."""
        b = self.b
        start, loop, end = b.block, b.append_basic_block(), b.append_basic_block()
        b.branch(loop)
        b.position_at_end(loop)
        i, total = b.phi(I64), b.phi(self.kind)
        new = body(i, b.add(S, b.mul(i, b.mul(self.N, I64(4)))), total)
        following = b.add(i, I64(1))
        for phi, first, value in ((i, I64(0), following), (total, ir.Constant(self.kind, None), new)):
            phi.add_incoming(first, start)
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", following, self.N), loop, end)
        b.position_at_end(end)
        return new


def _delta(k: _Keys, S: Any, w: Any, key: Any, kappa: Any, beta: Any, r: Any, v: Any, out: Any) -> None:
    """removed = κ·S · S ← diag(w)·S + kᵀv − βᵀ·removed · out = r·S."""
    value = k.row(v)
    removed = k.sum(lambda i, row, total: k.add(total, k.multiply(k.row(row), k.each(kappa, i))), S)

    def update(i: Any, row: Any, total: Any) -> Any:
        less = k.multiply(removed, k.each(beta, i))
        new = k.b.fsub(k.multiply(value, k.each(key, i)), less, flags=_FMA)
        new = k.add(k.multiply(k.row(row), k.each(w, i)), new)
        k.store(new, row)
        return k.add(total, k.multiply(new, k.each(r, i)))

    k.store(k.sum(update, S), out)


def _linear(k: _Keys, S: Any, w: Any, key: Any, bonus: Any, r: Any, v: Any, out: Any) -> None:
    """out = r·(S + bonusᵀv) · S ← diag(w)·S + kᵀv; bonus is u∘k."""
    value = k.row(v)

    def update(i: Any, row: Any, total: Any) -> Any:
        old = k.row(row)
        seen = k.add(old, k.multiply(value, k.each(bonus, i)))
        k.store(k.add(k.multiply(old, k.each(w, i)), k.multiply(value, k.each(key, i))), row)
        return k.add(total, k.multiply(seen, k.each(r, i)))

    k.store(k.sum(update, S), out)


def _generator(emit: Callable[..., None], width: int) -> Callable[..., Any]:
    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:  # noqa: ARG001
        *addresses, N = args
        emit(_Keys(builder, width, N), *addresses)
        return context.get_dummy_value()

    return generate


def delta_step(width: int) -> Callable[..., None]:
    """RWKV-7's step for `width` columns: (S, w, k, κ, β, r, v, out, N), addresses and N int64. S, v and out are those
    of the first column, rows of S are N apart."""

    @intrinsic
    def step(typingctx, S, w, k, kappa, beta, r, v, out, N):  # type: ignore[no-untyped-def]  # noqa: ARG001
        return types.void(*[types.int64] * 9), _generator(_delta, width)

    return step


def linear_step(width: int) -> Callable[..., None]:
    """RWKV-5's and 6's step for `width` columns: (S, w, k, u∘k, r, v, out, N), as `delta_step`."""

    @intrinsic
    def step(typingctx, S, w, k, bonus, r, v, out, N):  # type: ignore[no-untyped-def]  # noqa: ARG001
        return types.void(*[types.int64] * 8), _generator(_linear, width)

    return step
