"""How CUDA kernels are compiled: lazily, and into a cache that is never stale.

Only kernels.cuda imports this, and with it numba.cuda. In numba's simulator (NUMBA_ENABLE_CUDASIM=1) Python runs the
same kernels. The arguments of a kernel have one of the kinds `Address`, `Slot`, `Int` and `Float`, which its own
signature names:

    @kernel(THREADS)
    def add_gated(x: Address, y: Address, gate: Address, D: Int) -> None:

In a graph, blocks of a launch may begin before the launch before it is complete. So every kernel calls `let_next_begin`
and then `wait_for_previous`, before which it reads nothing but weights and tables, and writes nothing.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import numba.cuda
from numba.cuda.core import caching, config, event

from rwkv_cli.kernels.cache import ANNOUNCERS
from rwkv_cli.kernels.kept import kept

cuda: Any = numba.cuda
types: Any = numba.cuda.types

SIMULATED = bool(config.ENABLE_CUDASIM)
# A token of a small model has kernels of a few blocks. That is no mistake to warn of.
config.CUDA_LOW_OCCUPANCY_WARNINGS = 0

Address = Annotated[Any, "address"]
"""The beginning of an array in global memory, or 0 if the array may be missing and is."""
Slot = Annotated[Any, "slot"]
"""The place of an address: that of an array that a run brings. So one CUDA graph serves any state."""
Int = Annotated[Any, "int"]
Float = Annotated[Any, "float"]

_TYPES = {"address": types.int64, "slot": types.int64, "int": types.int64, "float": types.float32}


@functools.cache
def kinds_of(annotated: Any) -> dict[str, str]:
    """The kind of each parameter of a kernel, or of each field of a table's row, in order."""
    hints = get_type_hints(annotated, include_extras=True)
    hints.pop("return", None)
    kinds: dict[str, str] = {}
    for name, hint in hints.items():
        (kinds[name],) = hint.__metadata__
    return kinds


class _Relay(event.Listener):  # type: ignore[misc]
    """Passes on the events of numba.cuda, which numba's own listeners do not hear."""

    def on_start(self, event: Any) -> None:
        for announcer in ANNOUNCERS:
            announcer.on_start(event)

    def on_end(self, event: Any) -> None:
        pass


# Of its events only that of a compiler's pass tells of a compilation.
event.register("numba-cuda:run_pass", _Relay())

function: Any = cuda.jit(device=True)
"""Decorator: make a function that kernels call."""

primitives: Any
tensor_cores: Any
if SIMULATED:
    from rwkv_cli.kernels.cuda.device import simulated as primitives
    from rwkv_cli.kernels.cuda.device import simulated as tensor_cores
else:
    from rwkv_cli.kernels.cuda.device import intrinsics as primitives
    from rwkv_cli.kernels.cuda.device import tensor_cores

f32, bf16, f16, half = primitives.f32, primitives.bf16, primitives.f16, primitives.half
i8, i16, i32, i64, words = primitives.i8, primitives.i16, primitives.i32, primitives.i64, primitives.words
put_f32, put_f64 = primitives.put_f32, primitives.put_f64
put_i16, put_i32, put_u8 = primitives.put_i16, primitives.put_i32, primitives.put_u8
bits, float_of, rounded = primitives.bits, primitives.float_of, primitives.rounded
through_half, dp4a = primitives.through_half, primitives.dp4a
products, products_8, plane_products = tensor_cores.products, tensor_cores.products_8, tensor_cores.plane_products
low_word, permute = primitives.low_word, primitives.permute
halves_product, halves_difference = primitives.halves_product, primitives.halves_difference
half_bits, half_products = primitives.half_bits, tensor_cores.half_products
four, four_words, quad_sum = primitives.four, primitives.four_words, primitives.quad_sum
shared_address, copy_ahead, put_copied = primitives.shared_address, primitives.copy_ahead, primitives.put_copied
end_of_copies, wait_for_copies = primitives.end_of_copies, primitives.wait_for_copies
warp_sum, warp_sums, warp_max = primitives.warp_sum, primitives.warp_sums, primitives.warp_max
largest_of_warp = primitives.largest_of_warp
wait_for_previous, let_next_begin = primitives.wait_for_previous, primitives.let_next_begin
prefetch = primitives.prefetch
exp, log, sqrt, tanh = primitives.exp, primitives.log, primitives.sqrt, primitives.tanh


class Kernel:
    """A function that is compiled when it is first launched.

    A block has at most `threads` threads, and a multiprocessor should hold `blocks` such blocks. Without these bounds
    ptxas saves registers by waiting for each load alone.
    """

    def __init__(self, body: Callable[..., None], name: str, threads: int, blocks: int) -> None:
        self.body, self.name, self.threads = body, name, threads
        self.kinds = kinds_of(body)
        self.signature = tuple(_TYPES[kind] for kind in self.kinds.values())
        self.bounds = threads, blocks
        with kept(config, caching):
            options = {} if SIMULATED else {"cache": True, "launch_bounds": self.bounds}
            self.dispatcher: Any = cuda.jit(**options)(body)


KERNELS: list[Kernel] = []
"""Every kernel that was made."""


def kernel(threads: int, blocks: int = 1, name: str = "") -> Callable[[Callable[..., None]], Kernel]:
    """Decorator: make a `Kernel` of a function. `name` tells the variants of one function apart."""

    def make(body: Callable[..., None]) -> Kernel:
        KERNELS.append(Kernel(body, name or body.__name__, threads, blocks))
        return KERNELS[-1]

    return make


MOST_WARPS = 32
"""Warps of the largest block."""


@function
def block_sum(value: Float, scratch: Any) -> Any:
    """The sum of `value` over a block, in every thread. The order of the sum depends only on the block's size.

    The block has whole warps. `scratch`, in shared memory, has `MOST_WARPS` elements.
    """
    lane, warp, warps = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32, cuda.blockDim.x // 32
    value = warp_sum(value)
    if lane == 0:
        scratch[warp] = value
    cuda.syncthreads()
    total = warp_sum(scratch[lane] if lane < warps else scratch.dtype.type(0))
    cuda.syncthreads()
    return total


@function
def block_max(value: Float, scratch: Any) -> Any:
    """The largest `value` of a block, in every thread. NaN is passed over. `scratch` is that of `block_sum`."""
    lane, warp, warps = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32, cuda.blockDim.x // 32
    value = warp_max(value)
    if lane == 0:
        scratch[warp] = value
    cuda.syncthreads()
    top = warp_max(scratch[lane if lane < warps else 0])
    cuda.syncthreads()
    return top
