"""A CUDA driver that is none: it counts calls, and its memory is the host's."""

import ctypes
from typing import Any

import numpy as np
import pytest
from lab import INTERPRETED


class Driver:
    """A driver with one GPU, as far as it is asked; `memory` bytes, `free` of them free."""

    CUDA_VERSION = 13050

    def __init__(self, **facts: Any) -> None:
        from cuda.bindings import driver

        self.real = driver
        self.facts = {"count": 1, "version": 13000, "capability": (9, 0), "memory": 80 << 30} | facts
        self.calls: list[str] = []
        self.held: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu") or name[2:3].islower():
            return getattr(self.real, name)
        if name.endswith("_v2"):  # CUDA 12 has these
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            return (self.facts.get("status", self.real.CUresult.CUDA_SUCCESS), *self.answer(name, *arguments))

        return call

    def answer(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        if name == "cuMemAlloc":
            memory = np.full(arguments[0] + 16, 0xFF, np.uint8)
            address = -(-memory.ctypes.data // 16) * 16
            self.held[address] = memory
            return (address,)
        if name == "cuMemFree":
            del self.held[arguments[0]]
        if name.startswith("cuMemcpy"):
            ctypes.memmove(*arguments[:3])
        minor = arguments[:1] == (self.real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,)
        return {
            "cuDriverGetVersion": (self.facts["version"],), "cuDeviceGetCount": (self.facts["count"],),
            "cuDeviceGet": (0,), "cuDeviceGetAttribute": (self.facts["capability"][minor],),
            "cuDeviceGetName": (b"NVIDIA Test\0\0",), "cuDeviceTotalMem": (self.facts["memory"],),
            "cuStreamEndCapture": ("graph",), "cuGraphInstantiate": ("executable",),
            "cuGraphGetEdges": (["a", "b"], ["b", "c"], ["plain"] * 2, 2),
        }.get(name, ())  # fmt: skip


def use_false_driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Put a false driver whose streams are numbers under the package until the end of a test.

    Kernels run in numba's simulator when they are launched or captured. A replay is only counted.
    """
    if INTERPRETED:
        pytest.skip("RWKV_TEST_PTX: the interpreter stands where the driver would")
    from rwkv_cli.kernels.cuda import driver, executable

    fake = Driver()
    monkeypatch.undo()  # the guards: memory is the driver's here
    monkeypatch.setattr(driver, "driver", fake)
    monkeypatch.setattr(driver, "_streams", lambda: driver.Streams(0, 1))
    monkeypatch.setattr(driver, "_thread", driver._Thread())
    for module in (driver, executable):
        monkeypatch.setattr(module, "SIMULATED", False)
    return fake
