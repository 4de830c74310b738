"""How every kernel is compiled: float flags, CPU features, and a cache that is never stale.

numba's own cache watches only the file of the function it caches, not its callees or imported constants. So the cache
folder is named by a hash of all kernel sources and of the compilers' versions.
"""

import functools
import getpass
import hashlib
import os
import platform
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
from numba.core.event import Event, Listener, register
from platformdirs import user_cache_path

from rwkv_cli.kernels.args import parse

config: Any = numba.core.config
"""numba's settings, made at run time."""

FASTMATH = {"contract", "reassoc", "nsz", "arcp"}
"""Sums may be reordered and fused. Never nnan or ninf: NaN and infinity keep their meaning."""

_COMPILING = threading.RLock()

FIXED_ORDER = {"contract"}
"""For a kernel whose float operations must come in one order: another one repeats them bit for bit, or a state
carries their differences on."""


@functools.cache
def cache_folder() -> Path:
    """The folder for compiled kernels: below $NUMBA_CACHE_DIR or in the user's cache, or where that is read-only in one
    of the user's own below the system's temporary folder. What lies there is run: nobody else may write to it."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    name = f"kernels-{digest.hexdigest()[:16]}"
    shared = Path(tempfile.gettempdir()) / f"rwkv-{os.getuid() if hasattr(os, 'getuid') else getpass.getuser()}"
    wanted = os.environ.get("NUMBA_CACHE_DIR")
    for parent in (Path(wanted) if wanted else user_cache_path("rwkv"), shared):
        try:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            (parent / name).mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=parent / name):
                pass
        except OSError:
            continue
        if not hasattr(os, "getuid") or (parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o022):
            return parent / name
    return Path(tempfile.mkdtemp(prefix="rwkv-kernels-"))


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


class _Announce(Listener):
    def __init__(self, say: Callable[[], object]) -> None:
        self.say, self.said = say, False

    def on_start(self, event: Event) -> None:  # noqa: ARG002 - the library's interface
        if not self.said:
            self.said = True
            self.say()

    def on_end(self, event: Event) -> None:
        pass


ANNOUNCERS: list[Listener] = []
"""For another compiler than numba's own to tell, too."""


def on_first_compilation(say: Callable[[], object]) -> None:
    """Have `say` called once, if and when a kernel has to be compiled rather than read from the cache."""
    ANNOUNCERS.append(_Announce(say))
    register("numba:compile", ANNOUNCERS[-1])
