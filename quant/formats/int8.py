"""Where quantized rows go: exponents, layouts and padding. How a row is rounded is the quantizer's business."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.quant.tensor import STRIP, Int8, column_width

Quantizer = Callable[[NDArray[np.float32], int], tuple[NDArray[np.int8], NDArray[np.uint16], float]]
"""(rows [R, K], unit) to int8 values [R, K padded to 32], float16 scale bits [R, K/32] and the squared error."""


def unit_of(absmax: float) -> int:
    """Exponent that brings the largest scale of a tensor to [2**14, 2**15), far from float16's subnormals."""
    exponent = int(np.floor(np.log2(absmax / 128))) if absmax > 0 else 0
    return min(max(exponent - 14, -100), 14)


def arrange(
    layout: str, width: int, values: NDArray[np.int8], scales: NDArray[np.uint16]
) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """Rows [R, K] and scales [R, K/32] in a layout of `Int8`, padded with zero rows to whole blocks of `width`."""
    if layout == "rows":
        return values, scales
    short = -len(values) % width
    values, scales = np.pad(values, ((0, short), (0, 0))), np.pad(scales, ((0, short), (0, 0)))
    blocks = len(values) // width
    scales = scales.reshape(blocks, width, -1).transpose(0, 2, 1)
    if layout == "tile":
        return values.reshape(blocks, width, -1, 4).transpose(0, 2, 1, 3), scales
    return values.reshape(blocks, width, -1).transpose(0, 2, 1), scales


def block_width(layout: str, N: int) -> int:
    """Rows that a block of `layout` takes together."""
    return {"rows": 1, "tile": STRIP}.get(layout) or column_width(N)


def quantize(w: NDArray[np.float32], layout: str, quantizer: Quantizer) -> Int8:
    """The whole matrix `w` [N, K] at once."""
    unit = unit_of(float(np.abs(w).max()))
    q, s, _ = quantizer(w, unit)
    values, scales = arrange(layout, block_width(layout, len(w)), q, s)
    N, K = w.shape
    return Int8(layout, (N, K), np.ascontiguousarray(values), np.ascontiguousarray(scales), unit)
