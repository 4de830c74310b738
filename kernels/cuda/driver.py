"""The CUDA driver as far as this package needs it: memory by address, one stream, graphs of launches.

In numba's simulator the device is the host. Its memory is numpy's, and there are no graphs.
"""

import contextlib
import ctypes
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

import numpy as np
from cuda.bindings import driver
from numpy.typing import NDArray

from rwkv_cli.errors import DeviceError
from rwkv_cli.kernels.cuda.device.compile import SIMULATED, cuda


def checked(result: tuple[Any, ...]) -> Any:
    """The value that a call of the driver returned beside its status. Raises DeviceError unless it succeeded."""
    status, *values = result
    if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise DeviceError("the GPU has no memory left; take a smaller model or batch, or --device cpu")
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"the GPU's driver reports {status.name}")
    return next(iter(values), None)


_ONE_AT_A_TIME = threading.Lock()


class Streams(NamedTuple):
    """The stream that everything goes through, in order, and one that is only used to capture graphs."""

    main: Any
    capturing: Any


@functools.cache
def _streams() -> Streams:
    return Streams(cuda.stream(), cuda.stream())


def stream() -> Any:
    """The one stream that everything goes through, in order."""
    with _ONE_AT_A_TIME:
        return _streams().main


class _Thread(threading.local):
    """A thread's own knowledge of the GPU: the stream as the driver's calls want it, once it has used it."""

    handle: int | None = None


_thread = _Thread()


def _handle() -> int:
    """The stream as the driver's calls want it, on a thread that may not have used the GPU before."""
    if _thread.handle is None:
        cuda.current_context()
        _thread.handle = int(stream())
    return _thread.handle


class Block:
    """Memory of the device, freed with its last reference. It begins at a multiple of 16."""

    def __init__(self, size: int) -> None:
        self.size = size
        if SIMULATED:
            # What a kernel reads before it is written is seen: all bits set are NaN.
            self._host = np.full(size + 16, 0xFF, np.uint8)
            self.address = -(-self._host.ctypes.data // 16) * 16
        else:
            cuda.current_context()
            self.address = int(checked(driver.cuMemAlloc(max(size, 1))))
            weakref.finalize(self, _free, self.address).atexit = False


def _free(address: int) -> None:
    cuda.current_context()  # this thread may have none yet
    driver.cuMemFree(address)


def upload(address: int, values: NDArray[Any]) -> None:
    """Copy a contiguous array of the host's to the device. The caller may change it as soon as this returns."""
    if SIMULATED:
        ctypes.memmove(address, values.ctypes.data, values.nbytes)
    elif values.nbytes:
        # The array lies in pageable memory, so the driver has its own copy when the call returns.
        checked(driver.cuMemcpyHtoDAsync(address, values.ctypes.data, values.nbytes, _handle()))
        if _reads_the_hosts_memory():
            synchronize()


@functools.cache
def _reads_the_hosts_memory() -> bool:
    """True if the GPU reads pageable memory of the host by itself. numba takes long to say so."""
    return bool(getattr(cuda.get_current_device(), "PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES", False))


def download(values: NDArray[Any], address: int) -> None:
    """Copy from the device into a contiguous array of the host's, when everything begun before is done."""
    if SIMULATED:
        ctypes.memmove(values.ctypes.data, address, values.nbytes)
    elif values.nbytes:
        checked(driver.cuMemcpyDtoHAsync(values.ctypes.data, address, values.nbytes, _handle()))
        synchronize()


def move(target: int, source: int, size: int) -> None:
    """Copy within the device."""
    if SIMULATED:
        ctypes.memmove(target, source, size)
    elif size:
        checked(driver.cuMemcpyDtoDAsync(target, source, size, _handle()))


def synchronize() -> None:
    """Wait until everything that was begun is done."""
    if not SIMULATED:
        checked(driver.cuStreamSynchronize(_handle()))


def capability() -> tuple[int, int]:
    """The GPU's compute capability."""
    major, minor = cuda.get_current_device().compute_capability
    return major, minor


def multiprocessors() -> int:
    """How many multiprocessors the GPU has."""
    return int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


class _Lent:
    """The owner of an array on memory of the host. It lives as long as the array or a view of it."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.__array_interface__ = values.__array_interface__
        self._values = values


class HostMemory:
    """Arrays of the host that the device copies to without a detour.

    There is memory for two, since whoever asks for one often has the last one still. It is used again when the array
    and its views are gone. Meanwhile further arrays have memory of their own, which the driver copies to by a detour.
    """

    def __init__(self) -> None:
        self._lent: list[tuple[NDArray[np.uint8], weakref.ref[_Lent]]] = []

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array with any values."""
        if len(self._lent) == 2:
            free = next((i for i, (_, lent) in enumerate(self._lent) if lent() is None), None)
            if free is None:
                return np.empty(shape, dtype)
            memory, _ = self._lent.pop(free)
        else:
            memory = np.empty(0, np.uint8)
        size = prod(shape) * dtype.itemsize
        if memory.size < size:
            memory = cuda.pinned_array(size, np.uint8)
        lent = _Lent(memory[:size].view(dtype).reshape(shape))
        self._lent.append((memory, weakref.ref(lent)))
        return np.asarray(lent)


_OVERLAPS = (9, 0)
"""The least compute capability whose kernels wait for each other by themselves (`compile`)."""


def _overlap(graph: Any) -> None:
    """Let each launch of a captured graph begin while the one before it ends, where the driver can."""
    # CUDA 12 has these calls with edges' data under names of their own.
    get, remove, add = (
        getattr(driver, f"{name}_v2", None) or getattr(driver, name)
        for name in ("cuGraphGetEdges", "cuGraphRemoveDependencies", "cuGraphAddDependencies")
    )
    status, *_, count = get(graph)
    if status != driver.CUresult.CUDA_SUCCESS or not count:
        return
    _, before, after, plain, _ = get(graph, count)
    early = driver.CUgraphEdgeData()
    early.from_port = driver.CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
    early.type = driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC.value
    checked(remove(graph, before, after, plain, count))
    checked(add(graph, before, after, [early] * count, count))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage: an array of the device that is freed while launches are captured would break the capture."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Graph:
    """Launches that are captured once and then repeated in one call."""

    def __init__(self, launch: Callable[[Any], None]) -> None:
        """Capture what `launch` begins on the stream that it is given. Raises DeviceError where the driver cannot.

        Nobody else uses that stream meanwhile, since what another thread began on it would be captured too.
        """
        relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        _handle()
        with _ONE_AT_A_TIME:
            on = _streams().capturing
            checked(driver.cuStreamBeginCapture(int(on), relaxed))
            try:
                with _no_collection():
                    launch(on)
            except BaseException as error:  # of the driver, of the layers between, or Ctrl-C
                _, graph = driver.cuStreamEndCapture(int(on))
                if graph:
                    driver.cuGraphDestroy(graph)
                if not isinstance(error, Exception):
                    raise
                raise DeviceError(f"the GPU's driver captures no graph: {error}") from error
            graph = checked(driver.cuStreamEndCapture(int(on)))
        try:
            if capability() >= _OVERLAPS:
                _overlap(graph)
            self._executable = checked(driver.cuGraphInstantiate(graph, 0))
        finally:
            driver.cuGraphDestroy(graph)
        weakref.finalize(self, driver.cuGraphExecDestroy, self._executable).atexit = False

    def __call__(self) -> None:
        checked(driver.cuGraphLaunch(self._executable, _handle()))
