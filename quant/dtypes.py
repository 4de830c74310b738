"""The dtypes of stored arrays by their safetensors names, and the numbers behind their bits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.numbers import FLOAT_DTYPES

BITS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F16": np.dtype("<u2"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
}
"""The NumPy dtype of an array's bits. NumPy has no bfloat16, so both 16-bit floats are unsigned integers here."""


SOURCE_DTYPES = (*FLOAT_DTYPES, "F64")
"""Float types of foreign checkpoints."""


def to_float32(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """The values of `bits` of any shape: exact, but for F64, which is rounded. `dtype` is one of SOURCE_DTYPES."""
    if dtype == "F32":
        return np.ascontiguousarray(bits, dtype=np.float32)
    if dtype == "F16":
        return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)
    if dtype == "F64":
        with np.errstate(over="ignore"):  # a number too large becomes an infinity, which conversion refuses
            return bits.astype(np.float32)
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def from_float32(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """The bits of `values`, exact where `to_float32` made them from the same dtype; BF16 truncates all others."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(values).view("<u2")[..., 1::2]  # the upper halves


def nearest(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """The bits of those numbers of a dtype that are nearest to finite `values`."""
    if dtype != "BF16":
        return from_float32(values, dtype)
    return ((np.ascontiguousarray(values).view(np.uint32) + np.uint32(1 << 15)) >> 16).astype("<u2")
