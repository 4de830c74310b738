"""How CUDA kernels are compiled: lazily, into a cache that is never stale, and known by signature to whoever asks.

Only the CUDA twin imports this, and with it numba.cuda. In numba's simulator (NUMBA_ENABLE_CUDASIM=1) the same kernels
are run by Python. Kernels take addresses (int64, global memory), sizes (int64) and numbers (float32), nothing else.
"""

from collections.abc import Callable
from typing import Any

import numba.cuda
from numba.cuda.core import config, event

from rwkv_cli.kernels.cache import ANNOUNCERS, cache_folder

cuda: Any = numba.cuda
types: Any = numba.cuda.types

SIMULATED = bool(config.ENABLE_CUDASIM)
# a token of a small model has kernels of a few blocks: that is no mistake to warn of
config.CUDA_LOW_OCCUPANCY_WARNINGS = 0


class _Relay(event.Listener):  # type: ignore[misc]
    """numba.cuda has events of its own, which numba's listeners do not hear."""

    def on_start(self, event: Any) -> None:
        for announcer in ANNOUNCERS:
            announcer.on_start(event)

    def on_end(self, event: Any) -> None:
        pass


event.register("numba-cuda:compile", _Relay())

function: Any = cuda.jit(device=True)
"""Decorator: a function that kernels call."""

primitives: Any
if SIMULATED:
    from rwkv_cli.kernels.cuda.device import simulated as primitives
else:
    from rwkv_cli.kernels.cuda.device import intrinsics as primitives

f32, bf16, f16, half = primitives.f32, primitives.bf16, primitives.f16, primitives.half
i8, i16, i32, i64, words = primitives.i8, primitives.i16, primitives.i32, primitives.i64, primitives.words
put_f32, put_f64 = primitives.put_f32, primitives.put_f64
put_i16, put_i32, put_u8 = primitives.put_i16, primitives.put_i32, primitives.put_u8
bits, float_of, rounded = primitives.bits, primitives.float_of, primitives.rounded
through_half, dp4a, products = primitives.through_half, primitives.dp4a, primitives.products
exp, log, sqrt, tanh = primitives.exp, primitives.log, primitives.sqrt, primitives.tanh


class Kernel:
    """A function that is compiled when it is first launched.

    `signature` has an i (int64) or f (float32) for each argument. `bounds` are the most threads of a block, and how
    many such blocks a multiprocessor should hold: without them, ptxas saves registers by waiting for each load alone.
    """

    def __init__(self, body: Callable[..., None], name: str, signature: str, bounds: tuple[int, int]) -> None:
        self.body, self.name, self.bounds = body, name, bounds
        self.signature = tuple({"i": types.int64, "f": types.float32}[kind] for kind in signature)
        before, config.CACHE_DIR = config.CACHE_DIR, str(cache_folder())
        try:
            options = {} if SIMULATED else {"cache": True, "launch_bounds": bounds}
            self.dispatcher: Any = cuda.jit(**options)(body)
        finally:
            config.CACHE_DIR = before


KERNELS: list[Kernel] = []
"""All that were made."""


def kernel(signature: str, threads: int, blocks: int = 1, name: str = "") -> Callable[[Callable[..., None]], Kernel]:
    """Decorator: a `Kernel`. `name` tells the variants of one body apart."""

    def make(body: Callable[..., None]) -> Kernel:
        KERNELS.append(Kernel(body, name or body.__name__, signature, (threads, blocks)))
        return KERNELS[-1]

    return make


@function
def block_sum(value, scratch):  # type: ignore[no-untyped-def]
    """The sum of `value` over a block, in every thread; in an order that depends on the block's size alone.

    The block has a multiple of 32 threads, `scratch` (shared) 32 more elements than those.
    """
    tid, n = cuda.threadIdx.x, cuda.blockDim.x
    scratch[tid] = value
    cuda.syncthreads()
    if tid < 32:
        total = scratch[tid]
        for i in range(tid + 32, n, 32):
            total += scratch[i]
        scratch[n + tid] = total
    cuda.syncthreads()
    total = scratch[n]
    for i in range(1, 32):
        total += scratch[n + i]
    cuda.syncthreads()
    return total


@function
def block_max(value, scratch):  # type: ignore[no-untyped-def]
    """The largest `value` of a block, as `block_sum`; NaN is passed over."""
    tid, n = cuda.threadIdx.x, cuda.blockDim.x
    scratch[tid] = value
    cuda.syncthreads()
    if tid < 32:
        top = scratch[tid]
        for i in range(tid + 32, n, 32):
            top = max(top, scratch[i])
        scratch[n + tid] = top
    cuda.syncthreads()
    top = scratch[n]
    for i in range(1, 32):
        top = max(top, scratch[n + i])
    cuda.syncthreads()
    return top
