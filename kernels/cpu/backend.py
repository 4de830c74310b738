"""The CPU as a `contract.Backend`."""

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.cpu.limits import limit_kernels as limit_kernels
from rwkv_cli.kernels.cpu.limits import product_peak as product_peak
from rwkv_cli.kernels.cpu.limits import read_bandwidth as read_bandwidth
from rwkv_cli.kernels.cpu.lower import kernels as kernels
from rwkv_cli.kernels.cpu.lower import lower as compile
from rwkv_cli.kernels.cpu.products import work as work
from rwkv_cli.kernels.cpu.weights import weight as weight
from rwkv_cli.kernels.program import Array

name = "cpu"
keeps_states = True
chunk = 252  # a multiple of 4 and of 6, the blocks of tokens that matrix products take

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
    return np.ascontiguousarray(values)


def device_array(values: Array) -> Array:
    return values


def describe() -> str:
    return "the CPU"
