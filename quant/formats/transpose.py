"""Bytes of rows brought to columns, as layouts want them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def transposed(rows: NDArray[Any], unit: int) -> NDArray[Any]:
    """Bytes [B, C, R, unit] of rows of bytes [B, R, C·unit], where `unit` is 1 or 4 and C·unit a multiple of 8.

    NumPy moves single bytes several times slower than words. So single bytes are moved in words of 8 first, and then
    within these.
    """
    word = np.uint64 if unit == 1 else np.uint32
    words = np.ascontiguousarray(np.ascontiguousarray(rows).view(word).transpose(0, 2, 1))
    moved = words.view(rows.dtype).reshape(*words.shape, -1)  # [B, words, R, bytes of a word]
    if unit == 1:
        moved = moved.transpose(0, 1, 3, 2)
    return moved.reshape(len(rows), -1, rows.shape[1], unit)
