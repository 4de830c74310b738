"""int8 weights in the order in which tensor cores take them (docs/cuda.md), and how they are put into it."""

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import Address, Int, cuda, i8, i16, i32, kernel, put_i16, put_i32
from rwkv_cli.numbers import GROUP

STRIP = 16
"""Rows of a fragment of weights, which has a group of columns of each."""
FRAGMENT_BYTES, SCALE_BYTES = STRIP * GROUP, STRIP * 2
"""Sizes of a fragment and of its scales."""
REPACK_THREADS = 256


@kernel(REPACK_THREADS)
def repack(source: Address, width: Int, out: Address, strips: Int, groups: Int) -> None:
    """Put a stored int8 matrix into the order of fragments.

    It is stored as tiles [S, K/4, 16, 4] if width is 0, else as columns [N/width, K, width]. Word i of lane 4g + t has
    row g + 8 (i mod 2) and the 4 columns from 4 (t + 4 (i div 2)). Threads take the words in turns.
    """
    total = strips * groups * 128
    for at in range(cuda.grid(1), total, cuda.gridsize(1)):
        i, lane, block = at % 4, at // 4 % 32, at // 128
        strip, quad = block // groups, block % groups * 8 + lane % 4 + i // 2 * 4
        row = lane // 4 + i % 2 * 8
        if width == 0:
            word = np.int64(i32(source + 4 * ((strip * groups * 8 + quad) * 16 + row)))
        else:
            n = strip * 16 + row
            first = source + (n // width * groups * 8 + quad) * 4 * width + n % width
            word = np.int64(i8(first) & 255)
            for k in range(1, 4):
                word |= np.int64(i8(first + k * width) & 255) << (8 * k)
        put_i32(out + 4 * at, word)


@kernel(REPACK_THREADS)
def repack_scales(source: Address, width: Int, out: Address, strips: Int, groups: Int) -> None:
    """Put float16 scales [N/width, K/GROUP, width] into the order [strips, groups, 8, 2]: rows g and g + 8.

    The width is 16 for scales of tiles.
    """
    for at in range(cuda.grid(1), strips * groups * 16, cuda.gridsize(1)):
        block = at // 16
        n = block // groups * 16 + at // 2 % 8 + at % 2 * 8
        put_i16(out + 2 * at, i16(source + 2 * ((n // width * groups + block % groups) * width + n % width)))
