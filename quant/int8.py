"""float32 to int8 in groups of 32 columns with float16 scales, 8.5 bits a weight.

A group's scale is found by search: from absmax/128 upward through the next CANDIDATES float16 numbers, the one with
the least squared error wins. Rounding errors of 32 values scatter by a sixth from scale to scale, so the best of
them beats plain absmax/127 (Q8_0) by about a fifth in KL at the same size.
"""

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from rwkv_cli.quant.tensor import GROUP, STRIP, Int8, column_width

CANDIDATES = 40


def unit_of(absmax: float) -> int:
    """Exponent that brings the largest scale of a tensor to [2**14, 2**15), far from float16's subnormals."""
    exponent = int(np.floor(np.log2(absmax / 128))) if absmax > 0 else 0
    return min(max(exponent - 14, -100), 14)


# All constants are in this function: numba's cache watches this file alone.
@njit(parallel=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def _quantize(w, unit, candidates, values, scales, errors):  # type: ignore[no-untyped-def]
    SIZE = 32
    rows, K = w.shape
    for n in prange(rows):
        group = np.empty(SIZE, np.float32)
        half = np.empty(1, np.uint32)
        error = np.float64(0)
        for g in range(scales.shape[1]):
            top = np.float32(0)
            for i in range(SIZE):
                k = g * SIZE + i
                group[i] = w[n, k] * unit if k < K else np.float32(0)
                top = max(top, abs(group[i]))
            if top == 0:
                scales[n, g] = 0
                values[n, g * SIZE : (g + 1) * SIZE] = 0
                continue
            # float16 bits of top/128, rounded down: the exponent is rebased from 127 to 15
            half[0] = 0
            base = top / np.float32(128)
            if base >= np.float32(2.0**-14):
                half.view(np.float32)[0] = base
                first = (half[0] >> 13) - (112 << 10)
            else:
                first = np.uint32(base * np.float32(2.0**24))
            best, least = np.uint32(0), np.float32(np.inf)
            for c in range(candidates):
                bits = max(first + c, 1)
                half[0] = bits << 13
                scale = half.view(np.float32)[0] * np.float32(2.0**112)
                inverse = np.float32(1) / scale
                total = np.float32(0)
                for i in range(SIZE):
                    q = min(max(np.rint(group[i] * inverse), np.float32(-128)), np.float32(127))
                    d = group[i] - q * scale
                    total += d * d
                if total < least:
                    best, least = bits, total
            half[0] = best << 13
            scale = half.view(np.float32)[0] * np.float32(2.0**112)
            inverse = np.float32(1) / scale
            for i in range(SIZE):
                q = min(max(np.rint(group[i] * inverse), np.float32(-128)), np.float32(127))
                values[n, g * SIZE + i] = np.int8(q)
            scales[n, g] = best
            error += least
        errors[n] = error / (np.float64(unit) * np.float64(unit))


def quantize_rows(w: NDArray[np.float32], unit: int) -> tuple[NDArray[np.int8], NDArray[np.uint16], float]:
    """int8 values [R, K padded], float16 scale bits [R, K/32] and the squared error of the rows `w` [R, K]."""
    groups = -(-w.shape[1] // GROUP)
    values = np.empty((len(w), groups * GROUP), np.int8)
    scales = np.empty((len(w), groups), np.uint16)
    errors = np.zeros(len(w))
    _quantize(np.ascontiguousarray(w), np.float32(2.0**-unit), CANDIDATES, values, scales, errors)
    return values, scales, float(errors.sum())


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


def quantize(w: NDArray[np.float32], layout: str = "tile") -> Int8:
    """The whole matrix `w` [N, K] at once."""
    unit = unit_of(float(np.abs(w).max()))
    q, s, _ = quantize_rows(w, unit)
    values, scales = arrange(layout, block_width(layout, len(w)), q, s)
    N, K = w.shape
    return Int8(layout, (N, K), np.ascontiguousarray(values), np.ascontiguousarray(scales), unit)
