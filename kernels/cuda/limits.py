"""The most that this GPU can do, to hold the other kernels against: moving memory, and multiplying int8."""

import numpy as np

from rwkv_cli.kernels.cpu.limits import best
from rwkv_cli.kernels.cuda.device.codes import STRIP
from rwkv_cli.kernels.cuda.device.compile import (
    SIMULATED,
    Address,
    Int,
    cuda,
    kernel,
    low_word,
    plane_products,
    put_i32,
)
from rwkv_cli.kernels.cuda.device.levels import TOKENS
from rwkv_cli.kernels.cuda.driver import Block, move, multiprocessors, stream, synchronize
from rwkv_cli.numbers import GROUP

_BYTES = 1 << 30
"""Bytes to copy: many times what a cache holds."""
_REPEATS = 8
_ROUNDS = 1 << 12
_CHAINS = 4
"""Independent sums of a warp in `multiply`, enough to keep the tensor cores busy."""
_THREADS = 256


@kernel(_THREADS)
def multiply(out: Address, rounds: Int) -> None:
    """Do `rounds` × `_CHAINS` tensor-core products a warp, each onto the sums of its chain. Each thread puts a sum."""
    word, level = low_word(0x01030507 * (np.int64(cuda.threadIdx.x) + 1)), np.int32(0x7F013355)
    weights, levels = (word, word, word, word), (level, level, level, level)
    s0 = s1 = s2 = s3 = (np.int32(0), np.int32(0), np.int32(0), np.int32(0))
    for _ in range(rounds):
        s0, s1 = plane_products(weights, levels, s0), plane_products(weights, levels, s1)
        s2, s3 = plane_products(weights, levels, s2), plane_products(weights, levels, s3)
    total = np.int64(0)
    for i in range(4):
        total += np.int64(s0[i]) + s1[i] + s2[i] + s3[i]
    put_i32(out + 4 * np.int64(cuda.grid(1)), total)


def read_bandwidth(threads: int, rounds: int = 5) -> float:  # noqa: ARG001 - they are the CPU's
    """Bytes a second that a copy within the GPU's memory reads and writes: the best of some rounds."""
    size = _BYTES >> (8 if SIMULATED else 0)
    source, target = Block(size), Block(size)

    def copy() -> None:
        for _ in range(_REPEATS):
            move(target.address, source.address, size)
        synchronize()

    return 2 * _REPEATS * size / best(copy, rounds)


def product_peak(threads: int, rounds: int = 5) -> float | None:  # noqa: ARG001 - they are the CPU's
    """Products of an int8 weight and an activation a second that tensor cores reach by `mma.sync`, two int8 products
    for each; None in the simulator."""
    if SIMULATED:
        return None
    blocks = 8 * multiprocessors()
    out = Block(4 * blocks * _THREADS)

    def run() -> None:
        multiply.dispatcher[blocks, _THREADS, stream()](out.address, _ROUNDS)
        synchronize()

    one = STRIP * TOKENS * GROUP
    return _ROUNDS * _CHAINS * blocks * (_THREADS // 32) * one / best(run, rounds)
