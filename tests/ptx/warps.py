"""What a warp's threads compute together. A thread is an element of each array, and 32 in a row are a warp."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.errors import UnknownInstructionError

LANES = 32
_MMA = re.compile(r"mma\.sync\.aligned\.m(8|16)n8k\d+\.row\.col\.(s32\.s8\.s8\.s32|f32\.f16\.f16\.f32)")


def product(opcode: str) -> Callable[[list[Any], list[Any], list[Any]], list[Any]]:
    """The function of an mma.sync: registers of both matrices and of the sums, to those of the result.

    Lane 4g + t has, of a matrix, numbers of row g in its first register, and those of row g + 8 in the second. Further
    registers have the next columns of both. Sums are columns 2t and 2t + 1 of these rows (PTX ISA, 9.7.15).
    """
    found = _MMA.fullmatch(opcode)
    if found is None:
        raise UnknownInstructionError(opcode)
    tall, integers = found[1] == "16", found[2].startswith("s32")
    packed, exact, sum_type = (np.int8, np.float32, np.int32) if integers else (np.float16, np.float64, np.float32)

    def rows(registers: list[Any]) -> Any:
        """Eight rows of each warp's matrix, with the columns of these registers side by side."""
        each = (x.view(packed).reshape(-1, 8, 4 * x.view(packed).size // x.size) for x in registers)
        return np.concatenate(list(each), 2)

    def multiply(left: list[Any], right: list[Any], sums: list[Any]) -> list[Any]:
        a = np.concatenate([rows(left[0::2]), rows(left[1::2])], 1) if tall else rows(left)
        dots = a.astype(exact) @ rows(right).astype(exact).transpose(0, 2, 1)
        parts = dots.reshape(len(dots), -1, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(len(sums), -1)
        if integers:
            return [part.astype(np.int32) + onto for part, onto in zip(parts, sums, strict=True)]
        return [(part + onto).astype(sum_type) for part, onto in zip(parts, sums, strict=True)]

    return multiply


def shuffle_source(mode: str, lane: Any, operand: Any) -> Any:
    """The lane whose value each lane gets by a shfl.sync among whole warps."""
    other = {"bfly": lane ^ operand, "up": lane - operand, "down": lane + operand, "idx": operand & (LANES - 1)}[mode]
    return np.where((other < 0) | (other >= LANES), lane, other)


def reduced(opcode: str, x: Any) -> Any:
    """What redux.sync gives every lane."""
    found = re.fullmatch(r"redux\.sync\.(max|min|add)\.([su])32", opcode)
    if found is None:
        raise UnknownInstructionError(opcode)
    values = (x.view(np.uint32) if found[2] == "u" else x).reshape(-1, LANES)
    result = {"max": np.max, "min": np.min, "add": np.sum}[found[1]](values, axis=1)
    return np.repeat(result.astype(values.dtype), LANES).view(np.int32)


def matrices(rows: Any, count: int) -> list[Any]:
    """The registers of ldmatrix of `count` matrices. `rows` are the 16 bytes at each lane's address."""
    words = rows.view(np.int32).reshape(-1, LANES // 8, 8, 4)
    return [np.ascontiguousarray(words[:, i]).reshape(-1) for i in range(count)]
