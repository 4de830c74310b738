"""Finds the GPUs, and says whether one can be used. This module needs nothing of CUDA to be imported."""

import importlib.util
from typing import Any, NamedTuple

from rwkv_cli.errors import DeviceError

_OLDEST = (7, 5)
"""The least compute capability: it has dp4a and int8 tensor cores."""
_WORKSPACE = 512 << 20
"""Bytes left free beside the weights, for activations, states and compiled kernels."""
_INSTALL = "pip install 'rwkv-cli[cuda]' (or [cuda12] for CUDA 12 drivers)"


class Gpu(NamedTuple):
    """A GPU: its memory in bytes, its compute capability as (major, minor)."""

    name: str
    memory: int
    capability: tuple[int, int]


def found() -> list[Gpu]:
    """The GPUs that the driver knows. The first is the one that is used.

    Raises DeviceError where there is none, and says why.
    """
    if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("cuda") is None:
        raise DeviceError(f"the CUDA packages are not installed: {_INSTALL}")
    from cuda.bindings import driver

    def ask(function: Any, *arguments: Any) -> Any:
        status, *values = function(*arguments)
        if status == driver.CUresult.CUDA_ERROR_NO_DEVICE:
            raise DeviceError("the NVIDIA driver finds no GPU: use --device cpu")
        if status != driver.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"the NVIDIA driver reports {status.name}")
        return next(iter(values), None)

    try:
        ask(driver.cuInit, 0)
    except DeviceError:
        raise
    except Exception:  # each release of the bindings has a class of its own
        raise DeviceError("there is no NVIDIA driver on this machine: install one, or use --device cpu") from None
    version, wheels = ask(driver.cuDriverGetVersion), driver.CUDA_VERSION
    if version // 1000 < wheels // 1000:
        raise DeviceError(
            f"the NVIDIA driver is for CUDA {version // 1000}.{version % 1000 // 10}, the installed packages for CUDA "
            f"{wheels // 1000}: update the driver, or pip install 'rwkv-cli[cuda{version // 1000}]'"
        )
    gpus = []
    attribute = driver.CUdevice_attribute
    for i in range(ask(driver.cuDeviceGetCount)):
        device = ask(driver.cuDeviceGet, i)
        major, minor = (
            ask(driver.cuDeviceGetAttribute, kind, device)
            for kind in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        name = ask(driver.cuDeviceGetName, 256, device).split(b"\0")[0].decode(errors="replace").strip()
        gpus.append(Gpu(name, int(ask(driver.cuDeviceTotalMem, device)), (major, minor)))
    if not gpus:
        raise DeviceError("the NVIDIA driver finds no GPU: use --device cpu")
    return gpus


def require(size: int, simulated: bool) -> None:
    """Raise DeviceError, with the figures, if no GPU has room for `size` bytes of weights.

    numba's simulator (NUMBA_ENABLE_CUDASIM=1) counts as a GPU if `simulated`.
    """
    if importlib.util.find_spec("numba_cuda") is not None:
        from rwkv_cli.kernels.cuda.device.compile import SIMULATED

        if SIMULATED and simulated:
            return
        if SIMULATED:
            raise DeviceError("numba only simulates a GPU (NUMBA_ENABLE_CUDASIM)")
    gpu, *_ = found()
    if gpu.capability < _OLDEST:
        has, least = (".".join(map(str, each)) for each in (gpu.capability, _OLDEST))
        raise DeviceError(
            f"{gpu.name} has compute capability {has}, {least} is the least that is supported: use --device cpu"
        )
    free = free_memory()
    if size + _WORKSPACE > free:
        raise DeviceError(
            f"{gpu.name} has {free / 1e9:.1f} GB of its {gpu.memory / 1e9:.1f} GB free, the model needs "
            f"{(size + _WORKSPACE) / 1e9:.1f} GB: use --device cpu, or a smaller model"
        )


def free_memory() -> int:
    """Bytes that the GPU in use has free."""
    from numba import cuda

    try:
        return int(cuda.current_context().get_memory_info().free)
    except Exception as error:  # classes of several packages, for a GPU that is full, in exclusive mode or broken
        raise DeviceError(f"the GPU cannot be used now ({error}): use --device cpu, or free it") from None
