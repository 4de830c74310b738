"""The CUDA twin's Backend: weights, vectors and states in the GPU's memory. Contracts are in `backend.Backend`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import Array
from rwkv_cli.kernels.cuda.array import DeviceArray
from rwkv_cli.kernels.cuda.device.compile import SIMULATED
from rwkv_cli.kernels.cuda.gpus import found
from rwkv_cli.kernels.cuda.limits import int8_peak, read_bandwidth
from rwkv_cli.kernels.cuda.lower import Recorder
from rwkv_cli.kernels.cuda.weights import float_weight, int8_weight, weight_size

__all__ = [
    "Recorder", "describe", "device_array", "float_weight", "int8_peak", "int8_weight", "read_bandwidth", "record",
    "vector", "weight_size",
]  # fmt: skip


def vector(values: NDArray[np.float32]) -> Array:
    return DeviceArray.of(values)


def device_array(values: Any) -> Array:
    return values if isinstance(values, DeviceArray) else DeviceArray.of(np.asarray(values, np.float32))


def record(inputs: Sequence[Array], threads: int) -> Recorder:  # noqa: ARG001 - those of the CPU
    return Recorder(inputs)


def describe() -> str:
    return "a simulated GPU" if SIMULATED else found()[0].name
