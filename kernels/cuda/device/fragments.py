"""Weights in the order in which tensor cores take them (docs/cuda.md), and how they are put into it."""

import numpy as np

from rwkv_cli.kernels.cuda.device.codes import LOW_PLANE, code_at
from rwkv_cli.kernels.cuda.device.compile import (
    Address,
    Int,
    cuda,
    i8,
    i16,
    i32,
    kernel,
    put_i16,
    put_i32,
    put_u8,
)
from rwkv_cli.numbers import GROUP

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
def repack_codes(source: Address, width: Int, out: Address, strips: Int, groups: Int, bits: Int) -> None:
    """Put stored codes of 4, 5 or 6 bits into the order of fragments.

    They are stored as tiles [S, groups, 64·bits] if width is 0, else as columns [N/width, K, width·bits/8], each in
    chunks of 128 rows. Threads take a lane's codes in turns: those of the words that `repack` has.
    """
    for at in range(cuda.grid(1), strips * groups * 32, cuda.gridsize(1)):
        lane, block = at % 32, at // 32
        fragment, rest = out + 64 * bits * block, np.int64(0)
        for word in range(4):
            low, n = np.int64(0), block // groups * 16 + lane // 4 + word % 2 * 8
            piece = lane % 4 + word // 2 * 4
            for i in range(4):
                if width == 0:
                    code = code_at(source + 64 * bits * block, 64, piece, n % 16 * 4 + i, bits)
                else:
                    column = n // width * groups * GROUP + block % groups * GROUP + 4 * piece + i
                    chunk = source + 16 * bits * (column * (width // 128) + n % width // 128)
                    code = code_at(chunk, 16, n % 128 // 16, n % 16, bits)
                low |= np.int64((code & 15) << (4 * i))
                rest |= np.int64((code >> 4) << ((bits - 4) * (4 * i + word)))
            put_i16(fragment + 8 * lane + 2 * word, low)
        if bits == 5:
            put_i16(fragment + LOW_PLANE + 2 * lane, rest)
        elif bits == 6:
            put_i32(fragment + LOW_PLANE + 4 * lane, rest)


@kernel(REPACK_THREADS)
def repack_scales(source: Address, width: Int, out: Address, strips: Int, groups: Int, size: Int) -> None:
    """Put scales [N/width, K/GROUP, width] of `size` bytes into the order [strips, groups, 8, 2]: rows g and g + 8.

    The width is 16 for scales of tiles.
    """
    for at in range(cuda.grid(1), strips * groups * 16, cuda.gridsize(1)):
        block = at // 16
        n = block // groups * 16 + at // 2 % 8 + at % 2 * 8
        place = source + size * ((n // width * groups + block % groups) * width + n % width)
        if size == 2:
            put_i16(out + 2 * at, i16(place))
        else:
            put_u8(out + at, i8(place))
