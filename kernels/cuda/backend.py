"""The GPU as a `contract.Backend`: weights, vectors and states lie in its memory."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import Loadable
from rwkv_cli.kernels.cuda.array import DeviceArray
from rwkv_cli.kernels.cuda.device.compile import SIMULATED
from rwkv_cli.kernels.cuda.executable import CudaProgram
from rwkv_cli.kernels.cuda.gpus import found
from rwkv_cli.kernels.cuda.limits import product_peak as product_peak
from rwkv_cli.kernels.cuda.limits import read_bandwidth as read_bandwidth
from rwkv_cli.kernels.cuda.lower import lower
from rwkv_cli.kernels.cuda.weights import weight as weight
from rwkv_cli.kernels.program import Array, Product, Program

name = "cuda"
keeps_states = False
chunk = 512  # whole blocks of `matmul_half`, and enough of them for every multiprocessor

__all__ = [
    "chunk",
    "compile",
    "describe",
    "device_array",
    "keeps_states",
    "kernels",
    "limit_kernels",
    "name",
    "product_peak",
    "read_bandwidth",
    "vector",
    "weight",
    "work",
]


def vector(values: NDArray[np.float32]) -> Array:
    return DeviceArray.of(values)


def device_array(values: Any) -> Array:
    return values if isinstance(values, DeviceArray) else DeviceArray.of(np.asarray(values, np.float32))


def compile(program: Program, threads: int) -> CudaProgram:  # noqa: ARG001 - they are the CPU's
    return lower(program)


def kernels(program: Program, threads: int) -> Sequence[Loadable]:  # noqa: ARG001 - a launch decides what is compiled
    return ()


def limit_kernels() -> Sequence[Loadable]:
    return ()


def work(product: Product) -> float:
    return math.prod(product.weight.shape)


def describe() -> str:
    if SIMULATED:
        return "a simulated GPU"
    gpu, *_ = found()
    return gpu.name
