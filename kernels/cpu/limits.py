"""The machine's limits, to hold the other kernels against: reading memory, and multiplying weights by activations."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from rwkv_cli.kernels.contract import Loadable
from rwkv_cli.kernels.cpu.args import I32_1, U64_1, unpack
from rwkv_cli.kernels.cpu.compile import has_vnni, kernel, pair_words
from rwkv_cli.kernels.cpu.elementwise import span
from rwkv_cli.kernels.cpu.llvm.emitter import I8, I16, I32, Emitter, vector
from rwkv_cli.kernels.cpu.steps import Share, Steps
from rwkv_cli.kernels.cpu.team import TEAM

_BYTES = 1 << 29
"""Bytes to read: many times what a cache holds."""
_ROUNDS = 1 << 21
_CHAINS = 16 if has_vnni() else 7
"""Independent sums of 16 lanes, enough to hide the latency of an instruction, and few enough for the registers."""
_PRODUCTS = 64 // 2 if has_vnni() else 32
"""Products of an int8 weight and an activation of 15 bits in one step. VNNI takes two planes for one."""


class ReadArgs(NamedTuple):
    """Words to read, and one result a part."""

    words: U64_1
    out: U64_1


@kernel(ReadArgs)
def _read(args: int, part: int, parts: int) -> None:
    """out[part] = XOR of the part's range of words."""
    a = unpack(args, ReadArgs)
    begin, end = span(part, parts, len(a.words))
    piece, total = a.words[begin:end], np.uint64(0)
    for i in range(len(piece)):
        total ^= piece[i]
    a.out[part] = total


@intrinsic
def _products(typingctx, byte):  # noqa: ARG001
    """Do `_ROUNDS` × `_CHAINS` times `vpdpbusd` or `pmaddwd` on registers; one lane of the sums."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        e, b, wide = Emitter(builder), builder, vector(I32, 16)
        operand = b.bitcast(e.splat(args[0], 16), vector(I8, 64) if has_vnni() else vector(I16, 32))

        def multiply(_round: Any, sums: list[Any]) -> list[Any]:
            if has_vnni():
                return [e.call("llvm.x86.avx512.vpdpbusd.512", wide, total, operand, operand) for total in sums]
            # the sums themselves are multiplied, or one product would serve all rounds
            return [b.add(total, e.pairs(b.bitcast(total, operand.type), operand)) for total in sums]

        total, *others = e.loop(I32(0), I32(_ROUNDS), 1, [ir.Constant(wide, None)] * _CHAINS, multiply)
        for value in others:
            total = b.xor(total, value)
        return b.extract_element(total, I32(0))

    return types.int32(types.int32), generate


class MultiplyArgs(NamedTuple):
    """One result a part."""

    out: I32_1


@kernel(MultiplyArgs)
def _multiply(args: int, part: int, parts: int) -> None:  # noqa: ARG001
    """Multiply in registers, and leave a number that depends on it."""
    a = unpack(args, MultiplyArgs)
    a.out[part] = _products(np.int32(part))  # type: ignore[call-arg]


def read_bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes a second that so many threads together read from memory: the best of some rounds."""
    words, out, steps = np.ones(_BYTES // 8, np.uint64), np.empty(64 * threads, np.uint64), Steps()
    steps.add(_read, ReadArgs(words, out), Share.fixed(len(out)))
    program = steps.finish()
    return _BYTES / best(lambda: program.run(threads), rounds)


def limit_kernels() -> list[Loadable]:
    """The kernels of the two functions here."""
    return [TEAM, _read, *([_multiply] if pair_words() else [])]


def product_peak(threads: int, rounds: int = 5) -> float | None:
    """Products of an int8 weight and an activation a second that so many threads together reach; None on no x86-64."""
    if not pair_words():
        return None
    out, steps = np.empty(threads, np.int32), Steps()
    steps.add(_multiply, MultiplyArgs(out), Share.fixed(threads))
    program = steps.finish()
    return _ROUNDS * _CHAINS * _PRODUCTS * threads / best(lambda: program.run(threads), rounds)


def best(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the quickest of `rounds` runs, after one that does not count."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
