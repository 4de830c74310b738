"""How every CPU kernel is compiled: float flags, CPU features, and the folder that numba keeps the code in."""

import functools
import platform
import threading
from collections.abc import Callable
from typing import Any

import llvmlite
import llvmlite.binding
import numba

from rwkv_cli.kernels.cache import cache_folder
from rwkv_cli.kernels.cpu.args import parse

config: Any = numba.core.config
"""numba's settings, made at run time."""

FASTMATH = {"contract", "reassoc", "nsz", "arcp"}
"""Sums may be reordered and fused. Never nnan or ninf: NaN and infinity keep their meaning."""

_COMPILING = threading.RLock()

FIXED_ORDER = {"contract"}
"""For a kernel whose float operations must come in one order: another one repeats them bit for bit, or a state
carries their differences on."""


def function(fastmath: set[str] = FASTMATH) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: a function that kernels call, compiled with them."""
    # numpy's division: by zero it gives infinity or NaN, where Python's test for it would keep loops scalar
    return numba.njit(fastmath=fastmath, error_model="numpy", nogil=True)


def cached(make: Callable[[], Any]) -> Any:
    """What `make` compiles, kept in `cache_folder`: numba picks the place when it is called, from this setting."""
    before = config.CACHE_DIR
    config.CACHE_DIR = str(cache_folder())
    try:
        return make()
    finally:
        config.CACHE_DIR = before


class Kernel:
    """A function (args, part) that threads of a team call, each for parts of its own; `spec` says what args holds."""

    def __init__(self, body: Callable[..., Any], spec: str, fastmath: set[str]) -> None:
        self.body, self.spec, self.fastmath = body, parse(spec), fastmath
        self.name = body.__name__

    @functools.cached_property
    def _compiled(self) -> Any:
        with _COMPILING:
            return cached(
                lambda: numba.cfunc("void(int64, int64)", fastmath=self.fastmath, error_model="numpy", cache=True)(
                    self.body
                )
            )

    @property
    def address(self) -> int:
        """Of its code, which is compiled or read from the cache when it is first asked for."""
        return int(self._compiled.address)


def kernel(spec: str, fastmath: set[str] = FASTMATH) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorator: a `Kernel`. Its body begins with `… = unpack(args, SPEC)`."""
    return lambda body: Kernel(body, spec, fastmath)


def _has(*features: str) -> bool:
    """Whether kernels are compiled for a CPU with these features."""
    if config.CPU_NAME:  # NUMBA_CPU_NAME asks for another CPU than this one
        return all(f"+{name}" in (config.CPU_FEATURES or "").split(",") for name in features)
    found = llvmlite.binding.get_host_cpu_features() if config.ENABLE_AVX else {}
    return all(found.get(name, False) for name in features)


@functools.cache
def has_vnni() -> bool:
    """Whether there is AVX-512 VNNI (`vpdpbusd` on 512 bits)."""
    return _has("avx512f", "avx512bw", "avx512vnni")


@functools.cache
def pair_words() -> int:
    """How many int16 `pmaddwd` takes: 16 with AVX2, 8 on any other x86-64, 0 on other machines, which have none."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return 0
    return 16 if _has("avx2") else 8
