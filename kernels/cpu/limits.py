"""What this machine can do at most, to hold the other kernels against: reading memory, and multiplying int8."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from rwkv_cli.kernels.cpu.args import unpack
from rwkv_cli.kernels.cpu.compile import has_vnni, kernel
from rwkv_cli.kernels.cpu.elementwise import span
from rwkv_cli.kernels.cpu.team import Program

_BYTES = 1 << 29
"""To read: many times what a cache holds."""
_ROUNDS = 1 << 21
_CHAINS = 16
"""Independent sums, enough to hide the latency of an instruction."""


READ = "u64.1 u64.1"


@kernel(READ)
def _read(args, part):  # type: ignore[no-untyped-def]
    """XOR of a range of words for each part."""
    words, out = unpack(args, READ)
    begin, end = span(part, len(out), len(words))
    piece, total = words[begin:end], np.uint64(0)
    for i in range(len(piece)):
        total ^= piece[i]
    out[part] = total


@intrinsic
def _products(typingctx, byte):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """`_ROUNDS` × `_CHAINS` times vpdpbusd (64 products) on registers; one lane of the sums."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        i32, i8 = ir.IntType(32), ir.IntType(8)
        wide, narrow = ir.VectorType(i32, 16), ir.VectorType(i8, 64)
        kind = ir.FunctionType(wide, [wide, narrow, narrow])
        dot = get_or_insert_function(b.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        one = b.insert_element(ir.Constant(wide, ir.Undefined), args[0], i32(0))
        operand = b.bitcast(b.shuffle_vector(one, one, ir.Constant(ir.VectorType(i32, 16), None)), narrow)
        start, body, end = b.block, b.append_basic_block(), b.append_basic_block()
        b.branch(body)
        b.position_at_end(body)
        count = b.phi(i32)
        sums = [b.phi(wide) for _ in range(_CHAINS)]
        new = [b.call(dot, [total, operand, operand]) for total in sums]
        following = b.add(count, i32(1))
        count.add_incoming(i32(0), start)
        count.add_incoming(following, body)
        for total, value in zip(sums, new, strict=True):
            total.add_incoming(ir.Constant(wide, None), start)
            total.add_incoming(value, body)
        b.cbranch(b.icmp_unsigned("<", following, i32(_ROUNDS)), body, end)
        b.position_at_end(end)
        total = new[0]
        for value in new[1:]:
            total = b.xor(total, value)
        return b.extract_element(total, i32(0))

    return types.int32(types.int32), generate


MULTIPLY = "i32.1"


@kernel(MULTIPLY)
def _multiply(args, part):  # type: ignore[no-untyped-def]
    (out,) = unpack(args, MULTIPLY)
    out[part] = _products(np.int32(part))  # type: ignore[call-arg]


def read_bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes a second that so many threads together read from memory: the best of some rounds."""
    words, out = np.ones(_BYTES // 8, np.uint64), np.empty(64 * threads, np.uint64)
    program = Program()
    program.add(_read, len(out), words, out)
    return _BYTES / best(lambda: program.run(threads), rounds)


def int8_peak(threads: int, rounds: int = 5) -> float | None:
    """int8 multiply-adds a second that so many threads together reach; None on a CPU without AVX-512 VNNI."""
    if not has_vnni():
        return None
    out = np.empty(threads, np.int32)
    program = Program()
    program.add(_multiply, threads, out)
    return _ROUNDS * _CHAINS * 64 * threads / best(lambda: program.run(threads), rounds)


def best(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the quickest of `rounds` runs, after one that does not count."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
