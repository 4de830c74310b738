"""A GPU that is this interpreter: `use` puts it under the package, before that is imported.

The package believes that numba simulates. So there are no graphs, and each run launches its kernels one by one.
"""

import functools
import importlib
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from ptx.launch import Launch, Run
from ptx.machine import execute
from ptx.parse import Code, parse
from ptx.spaces import UNWRITTEN, WRITTEN, GlobalMemory
from ptx.translate import Translated

MEMORY = GlobalMemory()
LAUNCHED: set[str] = set()
"""The names of the kernels that were executed."""
_RUNS: list[Run] = []
"""The run that is going on, if there is one."""


def use(capability: tuple[int, int]) -> None:
    """Have the package take this interpreter for its GPU, until the process ends."""
    from numba import cuda
    from numba.cuda import dispatcher

    device = SimpleNamespace(compute_capability=capability, MULTIPROCESSOR_COUNT=2)
    dispatcher.get_current_device = cuda.get_current_device = lambda: device
    cuda.pinned_array = np.empty
    compiling = importlib.import_module("rwkv_cli.kernels.cuda.device.compile")
    compiling.SIMULATED, compiling.Kernel.dispatcher = True, _Dispatcher(capability)
    driver = importlib.import_module("rwkv_cli.kernels.cuda.driver")
    driver.upload, driver.download, driver.move = _upload, _download, MEMORY.copy
    driver.Block.__init__ = _allocate
    driver._streams = lambda: driver.Streams(0, 1)
    executable = importlib.import_module("rwkv_cli.kernels.cuda.executable")
    _around(executable.CudaProgram, "run", lambda program: forget(program._workspace))
    overlaps = capability >= driver._OVERLAPS
    _around(executable.BoundLaunches, "_launch", lambda _: _RUNS.extend([Run(MEMORY, [], [])] * overlaps), _end_run)


def forget(block: Any) -> None:
    """Note that what memory holds is nothing."""
    MEMORY.mark(block.address, block.size, UNWRITTEN)


def _around(owner: Any, name: str, before: Callable[[Any], None], after: Callable[[], None] = lambda: None) -> None:
    """Do something before and after a method."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(self: Any, *arguments: Any) -> Any:
        before(self)
        try:
            result = method(self, *arguments)
        except BaseException:
            _RUNS.clear()
            raise
        after()
        return result

    setattr(owner, name, wrapped)


def _allocate(block: Any, size: int) -> None:
    block.size, block.address = size, MEMORY.allocate(size)
    weakref.finalize(block, MEMORY.free, block.address).atexit = False


def _upload(address: int, values: Any) -> None:
    MEMORY.mark(address, values.nbytes, WRITTEN)
    at = address - MEMORY.base
    MEMORY.data[at : at + values.nbytes] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _download(values: Any, address: int) -> None:
    at = address - MEMORY.base
    if values.size:
        values.reshape(-1).view(np.uint8)[:] = MEMORY.data[at : at + values.nbytes]


def _end_run() -> None:
    while _RUNS:
        _RUNS.pop().end()


class _Dispatcher:
    """Stands where a kernel has the dispatcher that numba made."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._capability = capability

    def __set__(self, kernel: Any, made: Any) -> None:
        pass

    def __get__(self, kernel: Any, _: Any) -> Any:
        return _Launcher(kernel, self._capability)


class _Launcher:
    """A kernel that is about to be launched: launcher[grid, threads, stream](*arguments)."""

    def __init__(self, kernel: Any, capability: tuple[int, int]) -> None:
        self._kernel, self._capability = kernel, capability

    def __getitem__(self, shape: tuple[Any, ...]) -> Callable[..., None]:
        grid, threads, *_ = shape
        grid, threads = _three(grid), _three(threads)

        def launch(*arguments: Any) -> None:
            LAUNCHED.add(self._kernel.name)
            code, translated = _compiled(self._kernel, self._capability)
            excuse = functools.partial(_beyond_the_last_token, self._kernel.name, grid[2], arguments)
            run = next(iter(_RUNS), None)
            execute(Launch(self._kernel.name, code, MEMORY, grid, threads, arguments, run, excuse), translated)

        return launch


def _three(shape: int | tuple[int, ...]) -> tuple[int, int, int]:
    """A shape of a launch in all its directions."""
    x, y, z, *_ = (*((shape,) if isinstance(shape, int) else shape), 1, 1)
    return x, y, z


@functools.cache
def _compiled(kernel: Any, capability: tuple[int, int]) -> tuple[Code, Translated]:
    from numba import cuda

    text, _ = cuda.compile_ptx(kernel.body, kernel.signature, cc=capability, launch_bounds=kernel.bounds)
    code = parse(text)
    return code, Translated(code)


def _beyond_the_last_token(name: str, products: int, arguments: Sequence[Any], address: Any) -> Any:
    """True for addresses in levels or factors of tokens that there are not, which tensor cores read (docs/cuda.md).

    A block of 8 tokens × 32 columns has a token's bytes side by side, and blocks lie as [tokens / 8, groups].
    """
    from rwkv_cli.kernels.cuda.device.levels import FACTOR_BYTES, PLANE_BYTES, TOKENS
    from rwkv_cli.kernels.cuda.device.matmul import PRODUCT, PRODUCT_ROW_BYTES

    excused = np.zeros(len(address), bool)
    if not name.startswith("matmul ") and not name.startswith("matmul_half "):
        return excused
    table, T = arguments
    block = PLANE_BYTES if name.split(",")[0].endswith("× 8") else 2 * PLANE_BYTES
    for row in range(table - MEMORY.base, table - MEMORY.base + PRODUCT_ROW_BYTES * products, PRODUCT_ROW_BYTES):
        fields = MEMORY.data[row : row + PRODUCT_ROW_BYTES].view(np.int64)
        groups = fields[PRODUCT.groups // 8]
        for start, size in ((PRODUCT.levels, block), (PRODUCT.factors, FACTOR_BYTES)):
            at = address - fields[start // 8]
            token = at // (size * groups) * TOKENS + at % size // (size // TOKENS)
            excused |= (at >= 0) & (token >= T) & (token < -(-T // _MOST_TOKENS) * _MOST_TOKENS)
    return excused


_MOST_TOKENS = 64
"""Tokens of the largest block of these kernels."""
