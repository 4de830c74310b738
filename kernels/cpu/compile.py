"""How every CPU kernel is compiled: float flags, CPU features, and the folder that numba keeps the code in."""

import functools
import platform
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding
import numba
from numba.core import caching

from rwkv_cli.kernels.cache import config
from rwkv_cli.kernels.kept import kept

FASTMATH = {"contract", "reassoc", "nsz", "arcp"}
"""Sums may be reordered and fused. Never nnan or ninf: NaN and infinity keep their meaning."""

_COMPILING = threading.RLock()

FIXED_ORDER = {"contract"}
"""For a kernel whose float operations must come in one order: another one repeats them bit for bit, or a state
carries their differences on."""


def function(fastmath: set[str] = FASTMATH, name: str = "") -> Callable[[Callable[..., Any]], Any]:
    """Decorator: a function that kernels call, compiled with them.

    One that is made several times, with other variables around it, needs a name for each. By its name a kernel's code
    finds it, and kernels that several processes have compiled come together from the cache. Raises ValueError without.
    """

    def make(body: Callable[..., Any]) -> Any:
        if body.__closure__ and not name:
            raise ValueError(f"{body.__qualname__} may be made several times, and needs a name for each")
        body.__qualname__ = name or body.__qualname__
        # numpy's division: by zero it gives infinity or NaN, where Python's test for it would keep loops scalar
        return numba.njit(fastmath=fastmath, error_model="numpy", nogil=True)(body)

    return make


def cached(make: Callable[[], Any]) -> Any:
    """Call `make`, whose compiled code is then kept in `cache_folder`."""
    with kept(config, caching):
        return make()


class Kernel:
    """A function that threads of a team call, each for parts of its own.

    Its arguments are the address of a row, packed from `record` (see `args`), a part's number, and how many parts there
    are.
    """

    def __init__(self, body: Callable[[int, int, int], None], record: type[NamedTuple], fastmath: set[str]) -> None:
        self.body, self.record, self.fastmath = body, record, fastmath
        self.name = body.__name__

    @functools.cached_property
    def _compiled(self) -> Any:
        def compile_() -> Any:
            decorate = numba.cfunc("void(int64, int64, int64)", fastmath=self.fastmath, error_model="numpy", cache=True)
            return decorate(self.body)

        with _COMPILING:
            return cached(compile_)

    def load(self) -> None:
        """Compile it, or read it from the cache."""
        self._compiled  # noqa: B018 - a cached property

    @property
    def address(self) -> int:
        """The address of its code, which is compiled or read from the cache when this is first asked for."""
        return int(self._compiled.address)


def kernel(
    record: type[NamedTuple], fastmath: set[str] = FASTMATH
) -> Callable[[Callable[[int, int, int], None]], Kernel]:
    """Make a `Kernel` of a function whose body begins with `a = unpack(args, RECORD)`."""
    return lambda body: Kernel(body, record, fastmath)


def _has(*features: str) -> bool:
    """True if kernels are compiled for a CPU with these features."""
    if config.CPU_NAME:  # NUMBA_CPU_NAME asks for another CPU than this one
        return all(f"+{name}" in (config.CPU_FEATURES or "").split(",") for name in features)
    found = llvmlite.binding.get_host_cpu_features() if config.ENABLE_AVX else {}
    return all(found.get(name, False) for name in features)


@functools.cache
def has_vnni() -> bool:
    """True if there is AVX-512 VNNI (`vpdpbusd` on 512 bits)."""
    return _has("avx512f", "avx512bw", "avx512vnni")


@functools.cache
def pair_words() -> int:
    """The number of int16 that `pmaddwd` takes: 16 with AVX2, 8 on any other x86-64, 0 where there is none."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return 0
    return 16 if _has("avx2") else 8


def instructions() -> str:
    """The name of the instructions that kernels are compiled for."""
    return "AVX-512 VNNI" if has_vnni() else "AVX2" if pair_words() == 16 else "portable"
