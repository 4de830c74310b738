"""Functions that kernels need beyond numba's own: memory by address, int8 products, bits of floats.

Every function has a twin of the same name in `simulated`. Addresses are int64 and lie in global memory.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numba.cuda
from llvmlite import ir
from numba.cuda.core import targetconfig
from numba.cuda.extending import intrinsic

types: Any = numba.cuda.types
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()

_function: Any = numba.cuda.jit(device=True)
exp, log = _function(lambda x: math.exp(x)), _function(lambda x: math.log(x))
sqrt, tanh = _function(lambda x: math.sqrt(x)), _function(lambda x: math.tanh(x))

_GLOBAL, _SHARED = 1, 3
"""LLVM's address spaces of global memory and of a block's."""
_WHOLE_WARP = 0xFFFFFFFF
_OF_WHOLE_WARP = ("convergent", "readnone", "nounwind")
"""A call that the whole warp takes part in, and that is moved into no branch."""
_VECTOR = ir.VectorType(I32, 4)
_cuda: Any = numba.cuda
_other_lanes = _cuda.shfl_xor_sync
"""The value that the lane has whose number differs by a mask."""


@_function
def warp_sum(value: Any) -> Any:
    """The sum of a warp's values, in every lane. Its order is fixed. All threads of the block must get here."""
    for halving in range(5):
        value += _other_lanes(_WHOLE_WARP, value, 16 >> halving)
    return value


@_function
def warp_sums(values: Any, count: Any) -> None:
    """`warp_sum` of each of `count` values of an array. They go together, since one alone waits for each step."""
    for halving in range(5):  # of a tuple's elements the compiler makes a loop
        for i in range(count):
            values[i] += _other_lanes(_WHOLE_WARP, values[i], 16 >> halving)


@_function
def warp_max(value: Any) -> Any:
    """The largest of a warp's float values, in every lane. All threads of the block must get here."""
    for halving in range(5):
        value = max(value, _other_lanes(_WHOLE_WARP, value, 16 >> halving))
    return value


@_function
def quad_sum(value: Any) -> Any:
    """The sum of four neighbouring lanes' values, in each of them. All threads of the block must get here."""
    value += _other_lanes(_WHOLE_WARP, value, 1)
    return value + _other_lanes(_WHOLE_WARP, value, 2)


def _emits(result: Any, *given: Any) -> Callable[[Callable[..., Any]], Any]:
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


def _pointer(b: Any, address: Any, kind: Any) -> Any:
    return b.inttoptr(address, ir.PointerType(kind, _GLOBAL))


def _load(kind: Any, result: Any, widen: Callable[[Any, Any], Any] = lambda _, value: value) -> Any:
    """A function of an address: the element of type `kind` there, made a `result` by `widen`."""
    return _emits(result, types.int64)(lambda b, address: widen(b, b.load(_pointer(b, address, kind))))


def _store(kind: Any, given: Any, narrow: Callable[[Any, Any], Any] = lambda _, value: value) -> Any:
    """A function of an address and a value, which it puts there as a `kind`."""
    return _emits(types.void, types.int64, given)(
        lambda b, address, value: b.store(narrow(b, value), _pointer(b, address, kind))
    )


f32 = _load(F32, types.float32)
i8 = _load(I8, types.int32, lambda b, value: b.sext(value, I32))
f16 = _load(I16, types.float32, lambda b, value: b.fpext(b.bitcast(value, F16), F32))
bf16 = _load(I16, types.float32, lambda b, value: b.bitcast(b.shl(b.zext(value, I32), I32(16)), F32))
i16 = _load(I16, types.int32, lambda b, value: b.sext(value, I32))
i32 = _load(I32, types.int32)
i64 = _load(I64, types.int64)
put_f32 = _store(F32, types.float32)
put_f64 = _store(F64, types.float64)
put_i32 = _store(I32, types.int64, lambda b, value: b.trunc(value, I32))
put_i16 = _store(I16, types.int64, lambda b, value: b.trunc(value, I16))
put_u8 = _store(I8, types.int64, lambda b, value: b.trunc(value, I8))

_FOUR, _FOUR_FLOATS = types.UniTuple(types.int32, 4), types.UniTuple(types.float32, 4)


def _capability() -> tuple[int, int]:
    """The compute capability that is compiled for."""
    capability: tuple[int, int] = targetconfig.ConfigStack().top().compute_capability
    return capability


def _volatile(b: Any, text: str, constraints: str, *operands: Any) -> None:
    """An instruction with no result. No load or store is moved from one side of it to the other."""
    kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
    constraints = ",".join(filter(None, [constraints, "~{memory}"]))
    b.call(ir.InlineAsm(kind, text, constraints, side_effect=True), list(operands))


def _tells(text: str) -> Callable[[Any], Any]:
    """An emitter of an instruction, of Hopper and later, that tells the GPU of the launches before and after."""
    return lambda b: _volatile(b, text, "") if _capability() >= (9, 0) else None


wait_for_previous = _emits(types.void)(_tells("griddepcontrol.wait;"))
"""Wait until the launch before is complete: what it wrote may be read from here on, and written over."""
let_next_begin = _emits(types.void)(_tells("griddepcontrol.launch_dependents;"))
"""Let the next launch's blocks begin, as far as there is room for them. They wait for this launch by themselves."""


@_emits(types.void, types.int64)
def prefetch(b: Any, address: Any) -> None:
    """Begin to bring 128 bytes into the GPU's cache."""
    kind = ir.FunctionType(ir.VoidType(), [I64])
    b.call(ir.InlineAsm(kind, "prefetch.global.L2 [$0];", "l", side_effect=True), [address])


def _load_four(b: Any, at: Any) -> list[Any]:
    """The elements of a vector of four at a multiple of 16, in one load."""
    vector = b.load(at, align=16)
    return [b.extract_element(vector, I32(i)) for i in range(4)]


@_emits(_FOUR, types.int64)
def words(b: Any, address: Any) -> list[Any]:
    """Four int32 at a multiple of 16, in one load."""
    return _load_four(b, _pointer(b, address, _VECTOR))


def _element(b: Any, array: Any, i: Any) -> Any:
    """The place of element i of an array in shared memory."""
    return b.gep(b.extract_value(array, 4), [i])  # numba's arrays: meminfo, parent, nitems, itemsize, data, …


def _four_of(kind: Any) -> Callable[[Any, Any, Any], list[Any]]:
    """An emitter of a load of four elements of type `kind`."""
    pointer = ir.PointerType(ir.VectorType(kind, 4))
    return lambda b, array, first: _load_four(b, b.bitcast(_element(b, array, first), pointer))


_FLOATS, _WORDS = (types.Array(kind, 1, "C") for kind in (types.float32, types.int32))
four = _emits(_FOUR_FLOATS, _FLOATS, types.int64)(_four_of(F32))
"""array[first … first + 3] of an array in shared memory that begins at a multiple of 16; so must `first`, of 4."""
four_words = _emits(_FOUR, _WORDS, types.int64)(_four_of(I32))
"""`four` of int32."""


@_emits(types.int64, _WORDS)
def shared_address(b: Any, array: Any) -> Any:
    """The address of an array in shared memory, as `copy_ahead` takes it."""
    at = b.addrspacecast(_element(b, array, I64(0)), ir.PointerType(I32, _SHARED))
    return b.zext(b.ptrtoint(at, I32), I64)


@_emits(_FOUR, types.int64, types.int64)
def copy_ahead(b: Any, at: Any, address: Any) -> list[Any]:
    """Begin to copy 16 bytes of global memory to an address in shared memory. Both are multiples of 16.

    From Ampere on this thread has them after a `wait_for_copies`, and other threads after a barrier behind that.
    Before Ampere they only come to registers, which are returned for `put_copied`.
    """
    if _capability() >= (8, 0):
        _volatile(b, "cp.async.cg.shared.global [$0], [$1], 16;", "r,l", b.trunc(at, I32), address)
        return [I32(0)] * 4
    return _load_four(b, _pointer(b, address, _VECTOR))


@_emits(types.void, types.int64, _FOUR)
def put_copied(b: Any, at: Any, copied: Any) -> None:
    """End what `copy_ahead` began, with what it returned: put that where it belongs, if it is not already there."""
    if _capability() < (8, 0):
        vector = ir.Constant(_VECTOR, ir.Undefined)
        for i in range(4):
            vector = b.insert_element(vector, b.extract_value(copied, i), I32(i))
        b.store(vector, b.inttoptr(b.trunc(at, I32), ir.PointerType(_VECTOR, _SHARED)), align=16)


@_emits(types.void)
def end_of_copies(b: Any) -> None:
    """Make one group of the copies that this thread has begun since the last group. It may be an empty one."""
    if _capability() >= (8, 0):
        _volatile(b, "cp.async.commit_group;", "")


@functools.cache
def wait_for_copies(most: int) -> Any:
    """A function that waits until at most so many of this thread's groups of copies are under way, the last ones."""

    @_emits(types.void)
    def wait(b: Any) -> None:
        if _capability() >= (8, 0):
            _volatile(b, f"cp.async.wait_group {most};", "")

    return wait


@_emits(types.float32, types.int32)
def half(b: Any, word: Any) -> Any:
    """The float16 in an int32's lower bits, as float32."""
    return b.fpext(b.bitcast(b.trunc(word, I16), F16), F32)


@_emits(types.int32, types.float32)
def bits(b: Any, x: Any) -> Any:
    """The bits of a float32 as int32."""
    return b.bitcast(x, I32)


@_emits(types.int32, types.int32)
def largest_of_warp(b: Any, x: Any) -> Any:
    """The largest of a warp's int32, in every lane. All threads of the block must get here."""
    if _capability() >= (8, 0):
        text, kind = "redux.sync.max.s32 $0, $1, 0xffffffff;", ir.FunctionType(I32, [I32])
        return b.call(ir.InlineAsm(kind, text, "=r,r"), [x], attrs=_OF_WHOLE_WARP)
    text, kind = "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;", ir.FunctionType(I32, [I32, I32])
    for distance in (16, 8, 4, 2, 1):
        other = b.call(ir.InlineAsm(kind, text, "=r,r,r"), [x, I32(distance)], attrs=_OF_WHOLE_WARP)
        x = b.select(b.icmp_signed(">", x, other), x, other)
    return x


@_emits(types.float32, types.int64)
def float_of(b: Any, bits: Any) -> Any:
    """The float32 that has the lower 32 bits of an int64."""
    return b.bitcast(b.trunc(bits, I32), F32)


@_emits(types.float32, types.float32)
def through_half(b: Any, x: Any) -> Any:
    """float32 rounded to the nearest float16, ties to even, as float32."""
    return b.fpext(b.fptrunc(x, F16), F32)


@_emits(types.int32, types.float32)
def half_bits(b: Any, x: Any) -> Any:
    """The bits of the nearest float16, ties to even."""
    return b.zext(b.bitcast(b.fptrunc(x, F16), I16), I32)


def _of_halves(name: str) -> Callable[[Any, Any, Any], Any]:
    """An emitter of an instruction on both float16 of two int32."""
    kind = ir.FunctionType(I32, [I32, I32])
    return lambda b, x, y: b.call(ir.InlineAsm(kind, f"{name}.rn.f16x2 $0, $1, $2;", "=r,r,r"), [x, y])


halves_product = _emits(types.int32, types.int32, types.int32)(_of_halves("mul"))
halves_difference = _emits(types.int32, types.int32, types.int32)(_of_halves("sub"))


@_emits(types.int32, types.float32)
def rounded(b: Any, x: Any) -> Any:
    """float32 to the nearest int32, ties to even. NaN gives 0."""
    return b.call(ir.InlineAsm(ir.FunctionType(I32, [F32]), "cvt.rni.s32.f32 $0, $1;", "=r,f"), [x])


@_emits(types.int32, types.int64)
def low_word(b: Any, x: Any) -> Any:
    """The lower 32 bits of an int64."""
    return b.trunc(x, I32)


@_emits(types.int32, types.int32, types.int32, types.int32)
def permute(b: Any, first: Any, second: Any, selectors: Any) -> Any:
    """Four of the eight bytes of `first` and then `second`, by the lower four nibbles of `selectors`.

    Three bits of a nibble are the byte's number. If the fourth is set, the byte becomes eight copies of its sign.
    """
    kind = ir.FunctionType(I32, [I32] * 3)
    return b.call(ir.InlineAsm(kind, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r"), [first, second, selectors])


@_emits(types.int32, types.int32, types.int32, types.int32)
def dp4a(b: Any, left: Any, right: Any, onto: Any) -> Any:
    """onto + Σ of the products of the four int8 in `left` and in `right`."""
    kind = ir.FunctionType(I32, [I32] * 3)
    return b.call(ir.InlineAsm(kind, "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r"), [left, right, onto])


def _mma(
    b: Any, shape: str, weights: list[Any], levels: list[Any], sums: list[Any], kinds: str = "s32.s8.s8.s32"
) -> list[Any]:
    """sums + weights · levels by one mma.sync of `shape` and `kinds`. Each list has the registers of one matrix."""
    n, at, groups = len(sums), 0, []
    for count in (n, len(weights), len(levels), n):
        groups.append("{" + ", ".join(f"${at + i}" for i in range(count)) + "}")
        at += count
    operands = [*weights, *levels, *sums]
    text = f"mma.sync.aligned.{shape}.row.col.{kinds} {', '.join(groups)};"
    of_sums, of_sum = ("f", F32) if kinds.startswith("f32") else ("r", I32)
    constraints = ",".join([f"={of_sums}"] * n + ["r"] * (len(operands) - n) + [of_sums] * n)
    kind = ir.FunctionType(ir.LiteralStructType([of_sum] * n), [I32] * (len(operands) - n) + [of_sum] * n)
    # The whole warp takes part. A volatile call is moved into no branch.
    done = b.call(ir.InlineAsm(kind, text, constraints, side_effect=True), operands)
    return [b.extract_value(done, i) for i in range(n)]


def _add_products(b: Any, weights: list[Any], levels: list[Any], sums: list[Any]) -> list[Any]:
    """sums + one plane of levels times weights, for 16 rows × 8 tokens × 32 columns."""
    if _capability() >= (8, 0):
        return _mma(b, "m16n8k32", weights, levels, sums)
    # Turing's tensor cores take 8 rows × 8 tokens × 16 columns at a time: columns and then rows in halves.
    left, left_8, right, right_8 = weights
    first, second = levels
    sum_0, sum_1, sum_2, sum_3 = sums
    upper = _mma(b, "m8n8k16", [left], [first], [sum_0, sum_1])
    upper = _mma(b, "m8n8k16", [right], [second], upper)
    lower = _mma(b, "m8n8k16", [left_8], [first], [sum_2, sum_3])
    return [*upper, *_mma(b, "m8n8k16", [right_8], [second], lower)]


@_emits(_FOUR, _FOUR, _FOUR, types.int64, types.int64, types.int64, types.int64)
def products(
    b: Any,
    weights: Any,
    levels: Any,
    lane: Any,  # noqa: ARG001
    weights_at: Any,  # noqa: ARG001
    bits: Any,  # noqa: ARG001
    levels_at: Any,  # noqa: ARG001
) -> list[Any]:
    """A warp's 16 rows × 8 tokens over 32 columns: Σ w·(256·high + low), int32, four of them in each lane.

    weights and levels are this lane's int8 of a weight and an activation fragment (docs/cuda.md). These begin at
    weights_at, stored in so many bits, and at levels_at, which only the simulator reads. Lane 4g + t gets (row g,
    token 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
    """
    w = [b.extract_value(weights, i) for i in range(4)]
    high_0, high_1, low_0, low_1 = (b.extract_value(levels, i) for i in range(4))
    high = _add_products(b, w, [high_0, high_1], [I32(0)] * 4)
    return _add_products(b, w, [low_0, low_1], [b.shl(total, I32(8)) for total in high])


@_emits(_FOUR, _FOUR, _FOUR, types.int64, types.int64, types.int64, types.int64)
def products_8(
    b: Any,
    weights: Any,
    levels: Any,
    lane: Any,  # noqa: ARG001
    weights_at: Any,  # noqa: ARG001
    bits: Any,  # noqa: ARG001
    levels_at: Any,  # noqa: ARG001
) -> list[Any]:
    """`products` with levels of 8 bits, which are one plane: Σ w·level. The last two of `levels` are not read."""
    w = [b.extract_value(weights, i) for i in range(4)]
    return _add_products(b, w, [b.extract_value(levels, i) for i in range(2)], [I32(0)] * 4)


@_emits(_FOUR, _FOUR, _FOUR, _FOUR)
def plane_products(b: Any, weights: Any, levels: Any, sums: Any) -> list[Any]:
    """sums + Σ w·high + Σ w·low: what tensor cores do of `products`, and nothing beside it."""
    w, x, onto = ([b.extract_value(each, i) for i in range(4)] for each in (weights, levels, sums))
    return _add_products(b, w, x[2:], _add_products(b, w, x[:2], onto))


@_emits(_FOUR_FLOATS, types.UniTuple(types.int32, 8), _FOUR, _FOUR_FLOATS)
def half_products(b: Any, weights: Any, levels: Any, sums: Any) -> list[Any]:
    """sums + a warp's 16 rows × 8 tokens over 32 columns, in float16 but for the sums, which lie as in `products`.

    Two of a lane's numbers are in each int32. Weights are those of columns 4t and 4t + 1 of row g and of row g + 8,
    then of the next two columns of both rows; then come columns 4t + 16 … likewise. Levels are token g's of columns
    4t … and of 4t + 16 ….
    """
    w, x, onto = (
        [b.extract_value(weights, i) for i in range(8)],
        *([b.extract_value(each, i) for i in range(4)] for each in (levels, sums)),
    )
    kinds = "f32.f16.f16.f32"
    if _capability() >= (8, 0):
        onto = _mma(b, "m16n8k16", w[:4], x[:2], onto, kinds)
        return _mma(b, "m16n8k16", w[4:], x[2:], onto, kinds)
    for i in range(4):
        onto = _mma(b, "m16n8k8", w[2 * i : 2 * i + 2], x[i : i + 1], onto, kinds)
    return onto
