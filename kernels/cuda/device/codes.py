"""Weights of 4, 5, 6 and 8 bits in fragments (docs/cuda.md): 8 are int8, the others codes that stand for int8 levels.

Codes become levels in registers. A `permute` looks four of them up among 8 levels: its selectors have 3 bits of each.
Wherever a function here takes `bits`, its caller has a constant, of which the compiler makes straight code.
"""

from typing import Any

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import (
    Address,
    Int,
    four_words,
    function,
    half,
    i8,
    i16,
    i32,
    i64,
    low_word,
    permute,
    prefetch,
    words,
)
from rwkv_cli.numbers import GROUP, LEVELS

STRIP = 16
"""Rows of a fragment of weights, which has a group of columns of each."""
LOW_PLANE = STRIP * GROUP // 2
"""Bytes of a fragment's lower four bits. The rest of its codes' bits come behind them."""


def fragment_bytes(bits: int) -> int:
    """The size of a fragment."""
    return STRIP * GROUP * bits // 8


def scale_bytes(bits: int) -> int:
    """The size of a fragment's scales, float16 or int8."""
    return 2 * STRIP if bits == 8 else STRIP


def _table(bits: int) -> tuple[int, ...]:
    """The levels as int32, four in each."""
    return tuple(np.array(LEVELS[bits], np.int8).view(np.int32).tolist())


_LEVELS4, _LEVELS5 = _table(4), _table(5)
# `_of_five_bits` needs the lower half of its levels to be negative, and the upper half not.
assert all((level < 0) == (code < 16) for code, level in enumerate(LEVELS[5]))


@function
def weights_at(fragment: Address, lane: Int, bits: Int) -> Any:
    """A lane's part of a fragment as four int32: int8, or two with the lower bits of codes and one with the rest."""
    if bits == 8:
        return words(fragment + 16 * lane)
    low, rest = i64(fragment + 8 * lane), np.int32(0)
    if bits == 5:
        rest = i16(fragment + LOW_PLANE + 2 * lane) & 0xFFFF  # so no sign is extended
    elif bits == 6:
        rest = i32(fragment + LOW_PLANE + 4 * lane)
    return low_word(low), low_word(low >> 32), rest, np.int32(0)


@function
def prefetch_fragment(fragment: Address, lane: Int, size: Int) -> None:
    """Begin to bring a fragment of weights into the GPU's cache. A warp does so together."""
    if lane % 8 == 0 and 16 * lane < size:
        prefetch(fragment + 16 * lane)


@function
def hidden_zero(number: Int) -> Any:
    """0, of a number from 0 to 2⁶² − 1 that is not the same in all lanes, which a compiler does not know."""
    return low_word(number >> 62)


@function
def levels_of(weights: Any, bits: Int, zero: Int) -> Any:
    """The int8 in four int32, as `words` of an int8 fragment has them, of a lane's `weights_at`.

    With a `hidden_zero` levels stay in registers of a lane. Constants would be put there for each `permute` anew.
    """
    if bits == 8:
        return weights
    first, second, rest, _ = weights
    if bits == 4:
        a, b = _of_four_bits(first, zero)
        c, d = _of_four_bits(second, zero)
    elif bits == 5:
        a, b = _of_five_bits(first, rest << 2, zero), _of_five_bits(first >> 16, rest << 1, zero)
        c, d = _of_five_bits(second, rest, zero), _of_five_bits(second >> 16, rest >> 1, zero)
    else:
        a, b = _of_six_bits(first, rest << 4, rest << 2)
        c, d = _of_six_bits(second, rest, rest >> 2)
    return a, b, c, d


@function
def _of_four_bits(codes: Int, zero: Int) -> Any:
    """The levels of eight codes: of those in the lower 16 bits, and of those in the upper."""
    which, upper = codes & 0x77777777, (codes >> 1) & 0x44444444 | 0x32103210
    return _chosen(which, upper, zero), _chosen(which >> 16, upper >> 16, zero)


@function
def _chosen(which: Int, upper: Int, zero: Int) -> Any:
    """Four levels: number `which` of the lower eight, or of the upper eight where `upper` selects them."""
    low = permute(_LEVELS4[0] ^ zero, _LEVELS4[1], which)
    return permute(low, permute(_LEVELS4[2] ^ zero, _LEVELS4[3], which), upper)


@function
def _of_five_bits(codes: Int, fifth: Int, zero: Int) -> Any:
    """The levels of four codes, whose upper bits are bits 2, 6, 10 and 14 of `fifth`.

    A selector whose fourth bit is set gives a byte of copies of its byte's sign. That is all ones among the negative
    levels and 0 among the others. So of each pair, what is not meant leaves what is meant as it is.
    """
    other = codes ^ 0x8888
    negative = permute(_LEVELS5[0] ^ zero, _LEVELS5[1], codes) & permute(_LEVELS5[2] ^ zero, _LEVELS5[3], other)
    positive = permute(_LEVELS5[4] ^ zero, _LEVELS5[5], codes) | permute(_LEVELS5[6] ^ zero, _LEVELS5[7], other)
    return permute(negative, positive, fifth & 0x4444 | 0x3210)


@function
def _of_six_bits(codes: Int, upper: Int, upper_of_second: Int) -> Any:
    """The levels, code − 32, of eight codes: of those in the lower 16 bits, and of those in the upper.

    Bits 4 and 5 of each byte of `upper` are those of the first four codes, and so on.
    """
    even, odd = codes & 0x0F0F0F0F, (codes >> 4) & 0x0F0F0F0F
    first = np.int64(permute(even, odd, 0x5140) | upper & 0x30303030)
    second = np.int64(permute(even, odd, 0x7362) | upper_of_second & 0x30303030)
    # No byte is over 63, so that none of these sums carries into the next byte.
    return low_word((first + 0x60606060) ^ 0x80808080), low_word((second + 0x60606060) ^ 0x80808080)


@function
def scales_at(scales: Address, pair: Int, bits: Int) -> Any:
    """The scales of rows g and g + 8 of a fragment in one int32, with g = `pair`."""
    return i32(scales + 4 * pair) if bits == 8 else i16(scales + 2 * pair)


@function
def shared_weights(array: Any, first: Int, lane: Int, bits: Int) -> Any:
    """`weights_at` of a fragment in shared memory, that begins at an int32 of an array."""
    if bits == 8:
        return four_words(array, first + 4 * lane)
    low, rest = first + 2 * lane, np.int32(0)
    if bits == 5:
        rest = _half_word(array, first + LOW_PLANE // 4, lane)
    elif bits == 6:
        rest = array[np.uint64(first + LOW_PLANE // 4 + lane)]
    return array[np.uint64(low)], array[np.uint64(low + 1)], rest, np.int32(0)


@function
def shared_scales(array: Any, first: Int, pair: Int, bits: Int) -> Any:
    """`scales_at` of scales in shared memory. Of codes, the upper half of the int32 is anything."""
    return array[np.uint64(first + pair)] if bits == 8 else _half_word(array, first, pair)


@function
def _half_word(array: Any, first: Int, i: Int) -> Any:
    """Number i of the 16 bits that lie in an array of int32 from `first` on, in an int32's lower half."""
    return low_word(np.int64(array[np.uint64(first + i // 2)]) >> (16 * (i % 2)))


@function
def both_scales(scales: Int, bits: Int) -> Any:
    """The float32 of both rows of a `scales_at`."""
    if bits == 8:
        return half(scales), half(scales >> 16)
    return np.float32(low_word(((scales & 255) ^ 128) - 128)), np.float32(low_word(scales >> 8))


@function
def code_at(codes: Address, unit: Int, piece: Int, i: Int, bits: Int) -> Any:
    """Code i of one of the eight pieces of `unit` codes that are stored at `codes` (docs/format.md)."""
    code = (i8(codes + piece // 2 * unit + i) >> (piece % 2 * 4)) & 15
    if bits == 5:
        code |= ((i8(codes + 4 * unit + i) >> piece) & 1) << 4
    elif bits == 6:
        code |= ((i8(codes + (4 + piece // 4) * unit + i) >> (piece % 4 * 2)) & 3) << 4
    return code
