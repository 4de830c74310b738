"""What those instructions compute that concern each thread alone: functions of arrays, where a thread is an element."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ptx.errors import UnknownInstructionError

DTYPES: dict[str, Any] = {
    "pred": np.bool_, "b8": np.int8, "s8": np.int8, "u8": np.uint8,
    "b16": np.int16, "s16": np.int16, "u16": np.uint16, "f16": np.float16,
    "b32": np.int32, "s32": np.int32, "u32": np.uint32, "f32": np.float32, "f16x2": np.int32,
    "b64": np.int64, "s64": np.int64, "u64": np.uint64, "f64": np.float64,
}  # fmt: skip
"""numpy's types for those of PTX. Bits without a type are a signed integer, and so are registers of such."""


class Meaning(NamedTuple):
    """What an instruction computes: a function of operands of some types, and the type of the result."""

    function: Callable[..., Any]
    takes: tuple[str, ...]
    gives: str


@functools.cache
def meaning(opcode: str) -> Meaning:
    """What an opcode computes. Raises UnknownInstructionError."""
    name, *more = opcode.split(".")
    for family in _FAMILIES:
        if (found := family(name, more)) is not None:
            return found
    raise UnknownInstructionError(opcode)


def _plain(name: str, more: list[str]) -> Meaning | None:
    """Instructions whose operands and result have one type, with no rounding but the ordinary one."""
    *mode, kind = more or [""]
    floating = kind.startswith("f")
    function = (_FLOAT if floating else _INTEGER).get(name) if kind in DTYPES else None
    if kind == "f16x2" and name in ("add", "sub", "mul") and mode == ["rn"]:
        return _of_halves(_FLOAT[name])
    allowed = {"rn", "approx", "ftz", "full"} if floating else {"lo"} if name in ("mul", "mad") else set()
    if function is None or not set(mode) <= allowed or kind == "f16x2":
        return None
    count = 3 if name in ("fma", "mad") else 1 if name in _UNARY else 2
    if "ftz" in mode:
        function = _flushing(function, kind)
    second = ("u32",) if name in ("shl", "shr") else (kind,) * (count - 1)
    return Meaning(function, (kind, *second), kind)


def _of_halves(function: Callable[..., Any]) -> Meaning:
    """An operation on both float16 of each int32."""

    def both(x: Any, y: Any) -> Any:
        return function(x.view(np.float16), y.view(np.float16)).view(np.int32)

    return Meaning(both, ("b32", "b32"), "b32")


def _flushing(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """A function whose operands and result are 0 where they are too small to be normal."""
    least = np.finfo(DTYPES[kind]).tiny

    def flushed(x: Any) -> Any:
        return np.where(np.abs(x) < least, np.copysign(DTYPES[kind](0), x), x)

    return lambda *operands: flushed(function(*map(flushed, operands)))


def _fma(a: Any, b: Any, c: Any) -> Any:
    """a·b + c, computed in twice the bits and then rounded."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b + c).astype(a.dtype)


def _fma_down(a: Any, b: Any, c: Any) -> Any:
    exact = a.astype(np.float64) * b + c
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


def _divide(a: Any, b: Any) -> Any:
    """The quotient of integers, rounded to zero."""
    return (a - np.fmod(a, b)) // b


def _shifted(shift: Callable[..., Any]) -> Callable[..., Any]:
    """A shift of PTX, which shifts everything out from the width on."""

    def shifted(x: Any, distance: Any) -> Any:
        most = 8 * x.dtype.itemsize - 1
        by = np.minimum(distance, most).astype(x.dtype)
        beyond = x >> most if shift is np.right_shift else np.zeros_like(x)
        return np.where(distance > most, beyond, shift(x, by))

    return shifted


def _permuted(x: Any, y: Any, selectors: Any) -> Any:
    """Four bytes of the eight of x and y. With its fourth bit set, a selector gives copies of the sign."""
    source = np.stack([x, y], 1).view(np.int8)
    chosen = (selectors[:, None] >> np.array([0, 4, 8, 12], np.int32)) & 15
    picked = np.take_along_axis(source, (chosen & 7).astype(np.int64), 1)
    return np.where(chosen & 8, picked >> 7, picked).astype(np.int8).view(np.int32)[:, 0]


def _inserted(field: Any, onto: Any, first: Any, count: Any) -> Any:
    """`onto` with `count` bits of `field` from bit `first` on."""
    width = 8 * onto.dtype.itemsize
    kind = DTYPES[f"u{width}"]
    first, count = (np.minimum(each & 255, width).astype(kind) for each in (first, count))
    ones = np.where(count >= width, ~kind(0), (kind(1) << np.minimum(count, kind(width - 1))) - kind(1))
    mask = np.where(first >= width, kind(0), ones << np.minimum(first, kind(width - 1)))
    placed = field.view(kind) << np.minimum(first, kind(width - 1))
    return (onto.view(kind) & ~mask | placed & mask).view(onto.dtype)


_INTEGER: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mad": lambda a, b, c: a * b + c, "div": _divide,
    "rem": np.fmod, "min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "shl": _shifted(np.left_shift),
    "shr": _shifted(np.right_shift),
}  # fmt: skip
_FLOAT: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": _fma, "div": np.divide, "min": np.fmin,
    "max": np.fmax, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "rcp": np.reciprocal, "ex2": np.exp2,
    "lg2": np.log2, "rsqrt": lambda x: np.reciprocal(np.sqrt(x)), "copysign": lambda sign, x: np.copysign(x, sign),
    "tanh": np.tanh,
}  # fmt: skip
_UNARY = ("neg", "abs", "not", "sqrt", "rcp", "ex2", "lg2", "rsqrt", "tanh")


def _multiplying(name: str, more: list[str]) -> Meaning | None:
    """Products with more bits than their factors, or with the upper ones; fma that is rounded down."""
    match name, more:
        case "fma", ["rm", "f32"]:
            return Meaning(_fma_down, ("f32",) * 3, "f32")
        case "mul", ["wide", kind]:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            return Meaning(lambda a, b: a.astype(DTYPES[wide]) * b.astype(DTYPES[wide]), (kind, kind), wide)
        case "mul", ["hi", kind]:
            shift = int(kind[1:])
            high = np.frompyfunc(lambda a, b: (a * b) >> shift, 2, 1)
            return Meaning(lambda a, b: high(a.astype(object), b).astype(DTYPES[kind]), (kind, kind), kind)
    return None


def _on_bits(name: str, more: list[str]) -> Meaning | None:
    """Instructions on bits and bytes."""
    match name, more:
        case "prmt", ["b32"]:
            return Meaning(_permuted, ("b32",) * 3, "b32")
        case "bfi", [kind]:
            return Meaning(_inserted, (kind, kind, "u32", "u32"), kind)
        case "dp4a", [left, right]:
            types = [DTYPES[f"{each[0]}8"] for each in (left, right)]

            def dots(a: Any, b: Any, onto: Any) -> Any:
                pair = (x.view(kind).reshape(-1, 4).astype(np.int32) for x, kind in zip((a, b), types, strict=True))
                return np.multiply(*pair).sum(1, dtype=np.int32) + onto

            return Meaning(dots, ("b32",) * 3, "b32")
    return None


_COMPARE: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}


def _choosing(name: str, more: list[str]) -> Meaning | None:
    """Comparisons, and choices by their result."""
    match name, more:
        case "setp", [how, kind] if how in _COMPARE and not (how == "ne" and kind.startswith("f")):
            return Meaning(_COMPARE[how], (kind, kind), "pred")
        case "setp", ["nan", kind]:
            return Meaning(lambda a, b: np.isnan(a) | np.isnan(b), (kind, kind), "pred")
        case "setp", [how, kind] if how[:-1] in _COMPARE and how.endswith("u") and kind.startswith("f"):
            compare = _COMPARE[how[:-1]]
            return Meaning(lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b), (kind, kind), "pred")
        case "selp", [kind]:
            return Meaning(lambda a, b, chosen: np.where(chosen, a, b), (kind, kind, "pred"), kind)
    return None


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _converting(name: str, more: list[str]) -> Meaning | None:
    """Conversions of numbers."""
    if name != "cvt" or len(more) < 2:
        return None
    *mode, to, source = more
    kind, floats = DTYPES[to], [each.startswith("f") for each in (to, source)]
    match mode, floats:
        case ["sat"], [True, True]:
            return Meaning(lambda x: np.where(x > 0, np.minimum(x, 1), 0).astype(kind), (source,), to)
        case [rounding], [False, True] if rounding in _ROUND:
            low, high = np.iinfo(kind).min, np.iinfo(kind).max

            def to_integer(x: Any) -> Any:
                whole = np.nan_to_num(_ROUND[rounding](x.astype(np.longdouble)), nan=0.0)
                return np.clip(whole, low, high).astype(kind)

            return Meaning(to_integer, (source,), to)
        case (["rn"], [True, _]) | ([], [False, False]) | ([], [True, True]):
            return Meaning(lambda x: x.astype(kind), (source,), to)
    return None


_FAMILIES = (_plain, _multiplying, _on_bits, _choosing, _converting)
