"""The inner loops of the matrix-valued recurrences: some columns of a head's state, all keys, one token.

Sums over keys stay in registers, one lane a column, and are taken key by key. So no sum crosses lanes, and the order
is the same whatever the width of a CPU's vectors.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from rwkv_cli.kernels.cpu.compile import has_vnni, pair_words
from rwkv_cli.kernels.cpu.llvm.emitter import F32, I64, Emitter, vector

_FMA = ("contract",)


class DeltaStep(NamedTuple):
    """Addresses (int64) of one head's float32 for a token of RWKV-7, and the head's size.

    state, value and out are those of the first column at hand; rows of the state are `size` apart.
    """

    state: int
    decay: int
    key: int
    kappa: int
    beta: int
    receptance: int
    value: int
    out: int
    size: int


class LinearStep(NamedTuple):
    """Addresses (int64) of one head's float32 for a token of RWKV-5 or 6, and the head's size; see `DeltaStep`."""

    state: int
    decay: int
    key: int
    bonus: int
    """u∘k."""
    receptance: int
    value: int
    out: int
    size: int


class _Keys:
    """Loops over the keys i < size, in which a sum of `width` columns is carried."""

    def __init__(self, e: Emitter, width: int, size: Any) -> None:
        self.e, self.b, self.kind, self.size = e, e.b, vector(F32, width), size

    def parts(self) -> Iterator[tuple["_Keys", range]]:
        """Parts of the columns for which three vectors fit the CPU's registers, and room is left."""
        width = self.kind.count
        step = min(width, 64 if has_vnni() else 2 * pair_words() or 16)
        for first in range(0, width, step):
            yield _Keys(self.e, step, self.size), range(first, first + step)

    def at(self, address: Any, lanes: range) -> Any:
        """The address of the first of these columns."""
        return self.b.add(address, I64(4 * lanes.start))

    def row(self, address: Any) -> Any:
        """The columns at an address."""
        return self.e.load(self.kind, address, align=4)

    def put(self, value: Any, address: Any) -> None:
        """Store the columns at an address."""
        self.e.store(value, address, align=4)

    def each(self, base: Any, i: Any) -> Any:
        """Number i of those at `base`, in every lane."""
        number = self.e.load(F32, self.b.add(base, self.b.mul(i, I64(4))), align=4)
        return self.e.splat(number, self.kind.count)

    def multiply(self, x: Any, y: Any) -> Any:
        return self.b.fmul(x, y, flags=_FMA)

    def add(self, x: Any, y: Any) -> Any:
        return self.b.fadd(x, y, flags=_FMA)

    def sum(self, body: Callable[[Any, Any, Any], Any], state: Any) -> Any:
        """Take a sum that begins with 0 through body(i, address of row i, sum so far); size is at least 1."""

        def step(i: Any, carried: list[Any]) -> list[Any]:
            row = self.b.add(state, self.b.mul(i, self.b.mul(self.size, I64(4))))
            return [body(i, row, carried[0])]

        return self.e.loop(I64(0), self.size, 1, [ir.Constant(self.kind, None)], step)[0]


def _delta(whole: _Keys, at: DeltaStep) -> None:
    """removed = κ·S · S ← diag(w)·S + kᵀv − βᵀ·removed · out = r·S."""
    removed_ = whole.sum(
        lambda i, row, total: whole.add(total, whole.multiply(whole.row(row), whole.each(at.kappa, i))), at.state
    )
    for k, lanes in whole.parts():
        value, removed = k.row(k.at(at.value, lanes)), k.e.lanes(removed_, lanes)

        def update(i: Any, row: Any, total: Any, k: _Keys = k, value: Any = value, removed: Any = removed) -> Any:
            less = k.multiply(removed, k.each(at.beta, i))
            new = k.b.fsub(k.multiply(value, k.each(at.key, i)), less, flags=_FMA)
            new = k.add(k.multiply(k.row(row), k.each(at.decay, i)), new)
            k.put(new, row)
            return k.add(total, k.multiply(new, k.each(at.receptance, i)))

        k.put(k.sum(update, k.at(at.state, lanes)), k.at(at.out, lanes))


def _linear(whole: _Keys, at: LinearStep) -> None:
    """out = r·(S + bonusᵀv) · S ← diag(w)·S + kᵀv."""
    for k, lanes in whole.parts():
        value = k.row(k.at(at.value, lanes))

        def update(i: Any, row: Any, total: Any, k: _Keys = k, value: Any = value) -> Any:
            old = k.row(row)
            seen = k.add(old, k.multiply(value, k.each(at.bonus, i)))
            k.put(k.add(k.multiply(old, k.each(at.decay, i)), k.multiply(value, k.each(at.key, i))), row)
            return k.add(total, k.multiply(seen, k.each(at.receptance, i)))

        k.put(k.sum(update, k.at(at.state, lanes)), k.at(at.out, lanes))


def _step(record: type[NamedTuple], emit: Callable[[_Keys, Any], None], width: int) -> Any:
    """A function of such a record, callable from a kernel."""

    @intrinsic
    def step(typingctx, places):  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e = Emitter(builder)
            at = e.record(record, args[0])
            emit(_Keys(e, width, at.size), at)  # type: ignore[attr-defined]
            return context.get_dummy_value()

        return types.void(places), generate

    return step


def delta_step(width: int) -> Any:
    """RWKV-7's step for `width` columns, callable from a kernel with a DeltaStep."""
    return _step(DeltaStep, _delta, width)


def linear_step(width: int) -> Any:
    """RWKV-5's and 6's step for `width` columns, callable from a kernel with a LinearStep."""
    return _step(LinearStep, _linear, width)
