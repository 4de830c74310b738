"""The choice of a device, made once, when a model is loaded."""

import importlib

from rwkv_cli.errors import DeviceError
from rwkv_cli.kernels.contract import Backend


def choose(device: str, size: int = 0) -> Backend:
    """The module for `device`: "cpu", "cuda", or "auto".

    "auto" is a GPU that has room for `size` bytes of weights, else the CPU. Raises DeviceError for a device that this
    machine lacks or that has too little memory, and says what there is.
    """
    if device in ("cuda", "auto"):
        from rwkv_cli.kernels.cuda.gpus import require

        try:
            require(size, simulated=device == "cuda")
        except DeviceError as error:
            if device == "cuda":
                raise DeviceError(f"device cuda: {error}") from None
        else:
            return _backend("cuda")
    elif device != "cpu":
        raise DeviceError(f"there is no device {device}: use --device cpu, cuda or auto")
    return _backend("cpu")


def _backend(device: str) -> Backend:
    """The module of a device, which is imported only here: a CPU needs nothing of CUDA."""
    backend: Backend = importlib.import_module(f"rwkv_cli.kernels.{device}.backend")
    return backend
