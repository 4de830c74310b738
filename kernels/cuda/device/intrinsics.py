"""Functions that kernels need beyond numba's own: memory by address, exchanges of a warp, bits of floats.

Every function has a twin of the same name in `simulated`. Addresses are int64 and lie in global memory.
"""

import math
from collections.abc import Callable
from typing import Any

import numba.cuda
from llvmlite import ir

from rwkv_cli.kernels.cuda.device.emit import (
    F16,
    F32,
    F64,
    FOUR,
    FOUR_FLOATS,
    I8,
    I16,
    I32,
    I64,
    capability,
    emits,
    types,
    volatile,
)

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
    """The sum of a warp's values, in every lane. Its order is fixed. All lanes of the warp must get here."""
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
    """The largest of a warp's float values, in every lane. All lanes of the warp must get here."""
    for halving in range(5):
        value = max(value, _other_lanes(_WHOLE_WARP, value, 16 >> halving))
    return value


@_function
def quad_sum(value: Any) -> Any:
    """The sum of four neighbouring lanes' values, in each of them. All lanes of the warp must get here."""
    value += _other_lanes(_WHOLE_WARP, value, 1)
    return value + _other_lanes(_WHOLE_WARP, value, 2)


def _pointer(b: Any, address: Any, kind: Any) -> Any:
    return b.inttoptr(address, ir.PointerType(kind, _GLOBAL))


def _load(kind: Any, result: Any, widen: Callable[[Any, Any], Any] = lambda _, value: value) -> Any:
    """A function of an address: the element of type `kind` there, made a `result` by `widen`."""
    return emits(result, types.int64)(lambda b, address: widen(b, b.load(_pointer(b, address, kind))))


def _store(kind: Any, given: Any, narrow: Callable[[Any, Any], Any] = lambda _, value: value) -> Any:
    """A function of an address and a value, which it puts there as a `kind`."""
    return emits(types.void, types.int64, given)(
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


def _tells(text: str) -> Callable[[Any], Any]:
    """An emitter of an instruction, of Hopper and later, that tells the GPU of the launches before and after."""
    return lambda b: volatile(b, text, "") if capability() >= (9, 0) else None


wait_for_previous = emits(types.void)(_tells("griddepcontrol.wait;"))
"""Wait until the launch before is complete: what it wrote may be read from here on, and written over."""
let_next_begin = emits(types.void)(_tells("griddepcontrol.launch_dependents;"))
"""Let the next launch's blocks begin, as far as there is room for them. They wait for this launch by themselves."""


@emits(types.void, types.int64)
def prefetch(b: Any, address: Any) -> None:
    """Begin to bring 128 bytes into the GPU's cache."""
    kind = ir.FunctionType(ir.VoidType(), [I64])
    b.call(ir.InlineAsm(kind, "prefetch.global.L2 [$0];", "l", side_effect=True), [address])


def _load_four(b: Any, at: Any) -> list[Any]:
    """The elements of a vector of four at a multiple of 16, in one load."""
    vector = b.load(at, align=16)
    return [b.extract_element(vector, I32(i)) for i in range(4)]


@emits(FOUR, types.int64)
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
four = emits(FOUR_FLOATS, _FLOATS, types.int64)(_four_of(F32))
"""array[first … first + 3] of an array in shared memory that begins at a multiple of 16; so must `first`, of 4."""
four_words = emits(FOUR, _WORDS, types.int64)(_four_of(I32))
"""`four` of int32."""


@emits(types.int64, _WORDS)
def shared_address(b: Any, array: Any) -> Any:
    """The address of an array in shared memory, as `copy_ahead` takes it."""
    at = b.addrspacecast(_element(b, array, I64(0)), ir.PointerType(I32, _SHARED))
    return b.zext(b.ptrtoint(at, I32), I64)


@emits(FOUR, types.int64, types.int64)
def copy_ahead(b: Any, at: Any, address: Any) -> list[Any]:
    """Begin to copy 16 bytes of global memory to an address in shared memory. Both are multiples of 16.

    From Ampere on this thread has them after a `wait_for_copies`, and others after a barrier behind that. Before
    Ampere they only come to registers, which are returned for `put_copied`.
    """
    if capability() >= (8, 0):
        volatile(b, "cp.async.cg.shared.global [$0], [$1], 16;", "r,l", b.trunc(at, I32), address)
        return [I32(0)] * 4
    return _load_four(b, _pointer(b, address, _VECTOR))


@emits(types.void, types.int64, FOUR)
def put_copied(b: Any, at: Any, copied: Any) -> None:
    """End what `copy_ahead` began, with what it returned: put that where it belongs, if it is not already there."""
    if capability() < (8, 0):
        vector = ir.Constant(_VECTOR, ir.Undefined)
        for i in range(4):
            vector = b.insert_element(vector, b.extract_value(copied, i), I32(i))
        b.store(vector, b.inttoptr(b.trunc(at, I32), ir.PointerType(_VECTOR, _SHARED)), align=16)


@emits(types.void)
def end_of_copies(b: Any) -> None:
    """Make one group of the copies that this thread has begun since the last group. It may be an empty one."""
    if capability() >= (8, 0):
        volatile(b, "cp.async.commit_group;", "")


@emits(types.void)
def wait_for_copies(b: Any) -> None:
    """Wait until at most two of this thread's groups of copies are under way, the last ones."""
    if capability() >= (8, 0):
        volatile(b, "cp.async.wait_group 2;", "")


@emits(types.float32, types.int32)
def half(b: Any, word: Any) -> Any:
    """The float16 in an int32's lower bits, as float32."""
    return b.fpext(b.bitcast(b.trunc(word, I16), F16), F32)


@emits(types.int32, types.float32)
def bits(b: Any, x: Any) -> Any:
    """The bits of a float32 as int32."""
    return b.bitcast(x, I32)


@emits(types.int32, types.int32)
def largest_of_warp(b: Any, x: Any) -> Any:
    """The largest of a warp's int32, in every lane. All lanes of the warp must get here."""
    if capability() >= (8, 0):
        text, kind = "redux.sync.max.s32 $0, $1, 0xffffffff;", ir.FunctionType(I32, [I32])
        return b.call(ir.InlineAsm(kind, text, "=r,r"), [x], attrs=_OF_WHOLE_WARP)
    text, kind = "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;", ir.FunctionType(I32, [I32, I32])
    for distance in (16, 8, 4, 2, 1):
        other = b.call(ir.InlineAsm(kind, text, "=r,r,r"), [x, I32(distance)], attrs=_OF_WHOLE_WARP)
        x = b.select(b.icmp_signed(">", x, other), x, other)
    return x


@emits(types.float32, types.int64)
def float_of(b: Any, bits: Any) -> Any:
    """The float32 that has the lower 32 bits of an int64."""
    return b.bitcast(b.trunc(bits, I32), F32)


@emits(types.float32, types.float32)
def through_half(b: Any, x: Any) -> Any:
    """float32 rounded to the nearest float16, ties to even, as float32."""
    return b.fpext(b.fptrunc(x, F16), F32)


@emits(types.int32, types.float32)
def half_bits(b: Any, x: Any) -> Any:
    """The bits of the nearest float16, ties to even."""
    return b.zext(b.bitcast(b.fptrunc(x, F16), I16), I32)


def _of_halves(name: str) -> Callable[[Any, Any, Any], Any]:
    """An emitter of an instruction on both float16 of two int32."""
    kind = ir.FunctionType(I32, [I32, I32])
    return lambda b, x, y: b.call(ir.InlineAsm(kind, f"{name}.rn.f16x2 $0, $1, $2;", "=r,r,r"), [x, y])


halves_product = emits(types.int32, types.int32, types.int32)(_of_halves("mul"))
halves_difference = emits(types.int32, types.int32, types.int32)(_of_halves("sub"))


@emits(types.int32, types.float32)
def rounded(b: Any, x: Any) -> Any:
    """float32 to the nearest int32, ties to even. NaN gives 0."""
    return b.call(ir.InlineAsm(ir.FunctionType(I32, [F32]), "cvt.rni.s32.f32 $0, $1;", "=r,f"), [x])


@emits(types.int32, types.int64)
def low_word(b: Any, x: Any) -> Any:
    """The lower 32 bits of an int64."""
    return b.trunc(x, I32)


@emits(types.int32, types.int32, types.int32, types.int32)
def permute(b: Any, first: Any, second: Any, selectors: Any) -> Any:
    """Four of the eight bytes of `first` and then `second`, by the lower four nibbles of `selectors`.

    Three bits of a nibble are the byte's number. If the fourth is set, the byte becomes eight copies of its sign.
    """
    kind = ir.FunctionType(I32, [I32] * 3)
    return b.call(ir.InlineAsm(kind, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r"), [first, second, selectors])


@emits(types.int32, types.int32, types.int32, types.int32)
def dp4a(b: Any, left: Any, right: Any, onto: Any) -> Any:
    """onto + Σ of the products of the four int8 in `left` and in `right`."""
    kind = ir.FunctionType(I32, [I32] * 3)
    return b.call(ir.InlineAsm(kind, "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r"), [left, right, onto])
