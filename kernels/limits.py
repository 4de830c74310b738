"""What this machine can do at most, to hold the other kernels against: reading memory, and multiplying int8."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import get_num_threads, prange
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from rwkv_cli.kernels.jit import has_vnni, kernel

_BYTES = 1 << 29
"""To read: many times what a cache holds."""
_ROUNDS = 1 << 21
_CHAINS = 16
"""Independent sums, enough to hide the latency of an instruction."""


@kernel(parallel=True)
def _read(words, threads, out):  # type: ignore[no-untyped-def]
    """XOR of all `words`, a range for each thread."""
    n = len(words) // threads
    for thread in prange(threads):
        part, total = words[thread * n : (thread + 1) * n], np.uint64(0)
        for i in range(len(part)):
            total ^= part[i]
        out[thread] = total


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


@kernel(parallel=True)
def _multiply(threads, out):  # type: ignore[no-untyped-def]
    for thread in prange(threads):
        out[thread] = _products(np.int32(thread))  # type: ignore[call-arg]


def read_bandwidth(rounds: int = 5) -> float:
    """Bytes a second that all threads together read from memory: the best of some rounds."""
    words = np.ones(_BYTES // 8, np.uint64)
    threads = get_num_threads()
    out = np.empty(threads, np.uint64)
    return _BYTES / _best(lambda: _read(words, threads, out), rounds)


def int8_peak(rounds: int = 5) -> float | None:
    """int8 multiply-adds a second that all threads together reach; None on a CPU without AVX-512 VNNI."""
    if not has_vnni():
        return None
    threads = get_num_threads()
    out = np.empty(threads, np.int32)
    return _ROUNDS * _CHAINS * 64 * threads / _best(lambda: _multiply(threads, out), rounds)


def _best(run: Callable[[], object], rounds: int) -> float:
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
