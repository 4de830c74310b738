"""How every kernel is compiled: float flags, CPU features, and a cache that is never stale.

numba's own cache watches only the file of the function it caches, not its callees or imported constants. So the cache
folder is named by a hash of all kernel sources and of the compilers' versions.
"""

import functools
import getpass
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
from numba.core.event import Event, Listener, register
from platformdirs import user_cache_path

# a thread that waits for others spins for some 10 µs and then sleeps: GNU OpenMP's own choice, milliseconds, makes
# every parallel kernel wait for whatever else runs on the core that a sleeping thread would free
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

config: Any = numba.core.config
"""numba's settings, made at run time."""

FASTMATH = {"contract", "reassoc", "nsz", "arcp"}
"""Sums may be reordered and fused. Never nnan or ninf: NaN and infinity keep their meaning."""


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


def kernel(parallel: bool = False, fastmath: set[str] = FASTMATH) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: njit with the house's flags, cached in `cache_folder`."""

    def decorate(function: Callable[..., Any]) -> Any:
        before = config.CACHE_DIR
        # numba picks the cache's place here, once, from this setting
        config.CACHE_DIR = str(cache_folder())
        try:
            # numpy's division: by zero it gives infinity or NaN, where Python's test for it would keep loops scalar
            return numba.njit(parallel=parallel, fastmath=fastmath, error_model="numpy", cache=True)(function)
        finally:
            config.CACHE_DIR = before

    return decorate


@functools.cache
def has_vnni() -> bool:
    """Whether kernels are compiled for a CPU with AVX-512 VNNI (`vpdpbusd` on 512 bits)."""
    if config.CPU_NAME:  # NUMBA_CPU_NAME asks for another CPU than this one
        return "+avx512vnni" in (config.CPU_FEATURES or "")
    if not config.ENABLE_AVX:
        return False
    features = llvmlite.binding.get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512vnni"))


class _Announce(Listener):
    def __init__(self, say: Callable[[], object]) -> None:
        self.say, self.said = say, False

    def on_start(self, event: Event) -> None:  # noqa: ARG002 - the library's interface
        if not self.said:
            self.said = True
            self.say()

    def on_end(self, event: Event) -> None:
        pass


def on_first_compilation(say: Callable[[], object]) -> None:
    """Have `say` called once, if and when a kernel has to be compiled rather than read from the cache."""
    register("numba:compile", _Announce(say))
