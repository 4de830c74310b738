"""LLVM code for kernels whose instructions matter: a small vocabulary over an IR builder."""

from typing import Any

from llvmlite import ir
from numba.core.cgutils import get_or_insert_function

from rwkv_cli.kernels.cpu.compile import pair_words

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def vector(element: Any, n: int) -> Any:
    return ir.VectorType(element, n)


class Emitter:
    """Small vocabulary over an IR builder: addresses are i64, vectors are loaded unaligned."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def load(self, kind: Any, address: Any, offset: int = 0) -> Any:
        place = self.b.add(address, I64(offset)) if offset else address
        value = self.b.load(self.b.inttoptr(place, kind.as_pointer()))
        value.align = 1
        return value

    def store(self, value: Any, address: Any) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer())).align = 1

    def pairs(self, x: Any, y: Any) -> Any:
        """x[2i] · y[2i] + x[2i + 1] · y[2i + 1] of int16, as int32."""
        b, n, words = self.b, x.type.count, pair_words()
        if not words:
            even, odd = range(0, n, 2), range(1, n, 2)
            return b.add(*(b.mul(*(self.widen(self.pick(v, half), I32) for v in (x, y))) for half in (even, odd)))
        name = {16: "llvm.x86.avx2.pmadd.wd", 8: "llvm.x86.sse2.pmadd.wd"}[words]
        kind = ir.FunctionType(vector(I32, words // 2), [vector(I16, words)] * 2)
        madd = get_or_insert_function(b.module, kind, name)
        parts = [
            b.call(madd, [self.pick(v, range(i, i + words)) for v in (x, y)]) for i in range(0, n, words)
        ]  # fmt: skip
        while len(parts) > 1:
            lanes = ir.Constant(vector(I32, 2 * parts[0].type.count), list(map(I32, range(2 * parts[0].type.count))))
            parts = [b.shuffle_vector(*two, lanes) for two in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def halves(self, address: Any) -> Any:
        """16 positive float16 as float32, 2**-112 of their value."""
        bits = self.b.zext(self.load(vector(I16, 16), address), vector(I32, 16))
        return self.b.bitcast(self.b.shl(bits, ir.Constant(vector(I32, 16), [I32(13)] * 16)), vector(F32, 16))

    def add_product(self, address: Any, sums: Any, scale: Any) -> None:
        """16 float32 at `address` += sums · scale, in the one form that makes all paths round alike."""
        b, floats = self.b, vector(F32, 16)
        product = b.fmul(b.sitofp(sums, floats), scale, flags=("contract",))
        self.store(b.fadd(self.load(floats, address), product, flags=("contract",)), address)

    def steps(self, base: Any, stride: Any, n: int) -> list[Any]:
        """n addresses. From 3 on they count from there, as a CPU adds a stride 1, 2 or 4 times for nothing."""
        places = [base]
        for i in range(1, n):
            origin, times = (places[3], i - 3) if i > 3 else (base, i)
            places.append(self.b.add(origin, self.b.mul(stride, I64(times))))
        return places

    def splat(self, scalar: Any, n: int) -> Any:
        one = self.b.insert_element(ir.Constant(vector(scalar.type, n), ir.Undefined), scalar, I32(0))
        return self.b.shuffle_vector(one, one, ir.Constant(vector(I32, n), None))

    def pick(self, x: Any, lanes: range) -> Any:
        mask = ir.Constant(vector(I32, len(lanes)), [I32(i) for i in lanes])
        return self.b.shuffle_vector(x, x, mask)

    def widen(self, x: Any, element: Any) -> Any:
        return self.b.sext(x, vector(element, x.type.count))
