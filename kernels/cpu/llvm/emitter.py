"""LLVM code for kernels whose instructions matter: a small vocabulary over an IR builder.

Addresses are int64, and vectors are loaded and stored unaligned.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from llvmlite import ir
from numba.core.cgutils import get_or_insert_function

from rwkv_cli.kernels.cpu.compile import has_vnni, pair_words

I1, I8, I16, I32, I64, F32 = *map(ir.IntType, (1, 8, 16, 32, 64)), ir.FloatType()

Record = TypeVar("Record", bound=NamedTuple)


def vector(element: Any, n: int) -> Any:
    """The type of n elements."""
    return ir.VectorType(element, n)


class Emitter:
    """Appends instructions to the code that numba is building."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def record(self, kind: type[Record], value: Any) -> Record:
        """The fields of a NamedTuple that a kernel has passed."""
        return kind(*(self.b.extract_value(value, i) for i in range(len(kind._fields))))

    def call(self, name: str, result: Any, *values: Any) -> Any:
        """Call an intrinsic or a function by its name."""
        kind = ir.FunctionType(result, [value.type for value in values])
        return self.b.call(get_or_insert_function(self.b.module, kind, name), list(values))

    def load(self, kind: Any, address: Any, offset: int = 0, align: int = 1) -> Any:
        """A value at `offset` bytes from an address."""
        place = self.b.add(address, I64(offset)) if offset else address
        value = self.b.load(self.b.inttoptr(place, kind.as_pointer()))
        value.align = align
        return value

    def store(self, value: Any, address: Any, align: int = 1) -> None:
        """Put a value at an address."""
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer())).align = align

    def loop(
        self, first: Any, limit: Any, step: int, carried: Sequence[Any], body: Callable[[Any, list[Any]], list[Any]]
    ) -> list[Any]:
        """Loop over counters from `first` to below `limit`, `step` apart; at least once.

        `body` (counter, values so far) makes new values of the carried ones. The last ones are returned.
        """
        b = self.b
        before, block, end = b.block, b.append_basic_block(), b.append_basic_block()
        b.branch(block)
        b.position_at_end(block)
        counter, old = b.phi(first.type), [b.phi(value.type) for value in carried]
        new = body(counter, old)
        following = b.add(counter, first.type(step))
        for phi, start, value in zip([counter, *old], [first, *carried], [following, *new], strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", following, limit), block, end)
        b.position_at_end(end)
        return new

    def pairs(self, x: Any, y: Any) -> Any:
        """x[2i] · y[2i] + x[2i + 1] · y[2i + 1] of int16, as int32."""
        b, n, words = self.b, x.type.count, pair_words()
        if not words:
            even, odd = range(0, n, 2), range(1, n, 2)
            return b.add(*(b.mul(*(self.widen(self.lanes(v, half), I32) for v in (x, y))) for half in (even, odd)))
        name = {16: "llvm.x86.avx2.pmadd.wd", 8: "llvm.x86.sse2.pmadd.wd"}[words]
        parts = [
            self.call(name, vector(I32, words // 2), *(self.lanes(v, range(i, i + words)) for v in (x, y)))
            for i in range(0, n, words)
        ]
        return self.joined(*parts)

    def even_and_odd(self, quads: Any) -> tuple[Any, Any]:
        """Int8 in fours, as int16 pairs of the first and third of each, and of the second and fourth."""
        words = self.b.bitcast(quads, vector(I16, quads.type.count // 2))
        by = self.constant(I16(8), words.type.count)
        return self.b.ashr(self.b.shl(words, by), by), self.b.ashr(words, by)

    def fours(self, weights: tuple[Any, Any], levels: Any, offset: int) -> Any:
        """The int32 sums of `even_and_odd` weights times four int16 levels, in that order, at an address."""
        n = weights[0].type.count
        pairs = (self.load(I32, levels, offset + 4 * i) for i in range(2))
        products = (
            self.pairs(words, self.b.bitcast(self.splat(pair, n // 2), words.type))
            for words, pair in zip(weights, pairs, strict=True)
        )
        return self.b.add(*products)

    def halves(self, address: Any) -> Any:
        """16 positive float16 as float32, 2**-112 of their value."""
        bits = self.b.zext(self.load(vector(I16, 16), address), vector(I32, 16))
        return self.b.bitcast(self.b.shl(bits, self.constant(I32(13), 16)), vector(F32, 16))

    def bytes_as_floats(self, address: Any) -> Any:
        """16 int8 as float32."""
        return self.b.sitofp(self.widen(self.load(vector(I8, 16), address), I32), vector(F32, 16))

    def interleaved(self, rows: list[Any]) -> Any:
        """Byte i of every row, then byte i + 1 of every row, …: of two or four vectors of one length."""
        count, n = len(rows), rows[0].type.count
        every = self.joined(*rows)
        order = [I32(i // count + n * (i % count)) for i in range(count * n)]
        return self.b.shuffle_vector(every, every, ir.Constant(vector(I32, count * n), order))

    def lookup(self, table: Sequence[int], index: Any) -> Any:
        """table[i] for each i < 16 of some bytes. The table has 16 numbers of a byte each."""
        n = index.type.count
        if pair_words() < 16:
            return self._selected([I8(value) for value in table], index)
        width, name = next(
            (width, name)
            for width, name in (
                (64, "llvm.x86.avx512.pshuf.b.512" if has_vnni() else ""),
                (32, "llvm.x86.avx2.pshuf.b"),
                (16, "llvm.x86.ssse3.pshuf.b.128"),
            )
            if name and n % width == 0
        )
        values = ir.Constant(vector(I8, width), [I8(table[i % 16]) for i in range(width)])
        parts = [
            self.call(name, values.type, values, self.lanes(index, range(i, i + width))) for i in range(0, n, width)
        ]
        return self.joined(*parts)

    def _selected(self, table: Sequence[Any], index: Any) -> Any:
        """`lookup` without an instruction for it: half of the table by each bit of the index."""
        n = index.type.count
        values = [self.constant(value, n) for value in table]
        bit = 1
        while len(values) > 1:
            is_set = self.b.icmp_unsigned("!=", self.b.and_(index, self.constant(I8(bit), n)), self.constant(I8(0), n))
            values = [self.b.select(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
            bit *= 2
        return values[0]

    def joined(self, *parts: Any) -> Any:
        """A power of two of vectors of one type, one behind the other."""
        while len(parts) > 1:
            count = 2 * parts[0].type.count
            lanes = ir.Constant(vector(I32, count), [I32(i) for i in range(count)])
            parts = tuple(self.b.shuffle_vector(*two, lanes) for two in zip(parts[::2], parts[1::2], strict=True))
        return parts[0]

    def add_product(self, address: Any, sums: Any, scale: Any) -> None:
        """16 float32 at `address` += sums · scale."""
        self.store(self.plus_product(self.load(vector(F32, 16), address), sums, scale), address)

    def plus_product(self, floats: Any, sums: Any, scale: Any) -> Any:
        """16 float32 + sums · scale, in the one form that makes all paths round alike."""
        product = self.b.fmul(self.b.sitofp(sums, floats.type), scale, flags=("contract",))
        return self.b.fadd(floats, product, flags=("contract",))

    def two_rows(self, group: Any, n: Any, first: Any) -> list[Any]:
        """The addresses of rows n and n + 1 of a RowGroup's or a CodeRows' list, where row 0 is at `first`."""
        numbers = self.b.add(group.rows, self.b.mul(n, I64(8)))
        return [self.b.add(first, self.b.mul(self.load(I64, numbers, 8 * i), group.stride)) for i in range(2)]

    def level_pairs(self, group: Any, n: Any, tokens: int) -> list[Any]:
        """The levels of rows n and n + 1 for each token, as int16 pairs in 16 lanes."""
        at = self.b.add(group.levels, self.b.mul(n, I64(2)))
        places = self.places(at, group.level_stride, tokens)
        return [self.b.bitcast(self.splat(self.load(I32, place), 16), vector(I16, 32)) for place in places]

    def add_pairs(self, total: Any, x: Any, y: Any, vnni: bool) -> Any:
        """total + x[2i] · y[2i] + x[2i + 1] · y[2i + 1] of 32 int16, as int32."""
        if not vnni:
            return self.b.add(total, self.pairs(x, y))
        operands = (self.b.bitcast(value, total.type) for value in (x, y))
        return self.call("llvm.x86.avx512.vpdpwssd.512", total.type, total, *operands)

    def add_rows(self, group: Any, tokens: int, sums: dict[tuple[int, int], Any], scales: list[Any]) -> None:
        """Add sums[t, i] · (scales[i] · factor of token t) to strip i of each token's totals."""
        factors = self.places(group.factors, group.factor_stride, tokens)
        for t, totals in enumerate(self.places(group.totals, group.total_stride, tokens)):
            by = self.splat(self.load(F32, factors[t]), 16)
            for i, scale in enumerate(scales):
                self.add_product(self.b.add(totals, I64(64 * i)), sums[t, i], self.b.fmul(scale, by))

    def places(self, base: Any, stride: Any, n: int) -> list[Any]:
        """n addresses, `stride` bytes apart. From 3 on they count from there: a CPU adds a stride once, twice or four
        times for nothing."""
        places = [base]
        for i in range(1, n):
            origin, times = (places[3], i - 3) if i > 3 else (base, i)
            places.append(self.b.add(origin, self.b.mul(stride, I64(times))))
        return places

    def constant(self, scalar: Any, n: int) -> Any:
        """A constant in each of n lanes."""
        return ir.Constant(vector(scalar.type, n), [scalar] * n)

    def splat(self, scalar: Any, n: int) -> Any:
        """A scalar in each of n lanes."""
        one = self.b.insert_element(ir.Constant(vector(scalar.type, n), ir.Undefined), scalar, I32(0))
        return self.b.shuffle_vector(one, one, ir.Constant(vector(I32, n), None))

    def lanes(self, x: Any, lanes: range) -> Any:
        """Some lanes of a vector."""
        mask = ir.Constant(vector(I32, len(lanes)), [I32(i) for i in lanes])
        return self.b.shuffle_vector(x, x, mask)

    def widen(self, x: Any, element: Any) -> Any:
        """Signed integers in a wider type."""
        return self.b.sext(x, vector(element, x.type.count))

    def opaque(self, value: Any) -> Any:
        """The value, which LLVM then knows nothing about."""
        return self.b.asm(ir.FunctionType(value.type, [value.type]), "", "=r,0", [value], False)
