"""Compiled code on disk, which runs only as it was written.

numba's own files of code have no checksum: a damaged one ends the program, or its code is run.
"""

import contextlib
import hashlib
import pickle
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core.serialize import dumps

from rwkv_cli.kernels.cache import cache_folder, tell

_DIGEST = hashlib.sha256().digest_size


class CodeFiles:
    """The compiled variants of one function, a file each: the SHA-256 of what follows, then a pickle.

    It takes the place of numba's IndexDataCacheFile. Sources need no stamp here: the folder is named by their hash.
    The path of a source is in no name, so that a program at two places compiles its kernels once.
    """

    def __init__(self, cache_path: str, filename_base: str, source_stamp: object) -> None:  # noqa: ARG002 - numba's
        package = Path(cache_path).name.rpartition("_")[0]  # numba appends a hash of the source's path
        self._folder, self._name = cache_folder(), f"{package}.{filename_base}"

    def _path(self, key: object) -> Path:
        digest = hashlib.sha256(f"{numba.__version__} {key!r}".encode()).hexdigest()
        return self._folder / f"{self._name}.{digest[:16]}.code"

    def flush(self) -> None:
        """Remove every variant."""
        for path in self._folder.glob(f"{self._name}.*.code"):
            path.unlink(missing_ok=True)

    def load(self, key: object) -> Any:
        """The code of a variant, or None if it is not there or is damaged. A damaged file is removed."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if content[:_DIGEST] == hashlib.sha256(content[_DIGEST:]).digest():
            found, code = pickle.loads(content[_DIGEST:])
            return code if found == key else None
        tell(f"{self._folder}: a compiled kernel there was damaged. It is compiled again.")
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def save(self, key: object, data: object) -> None:
        """Keep the code of a variant, or say why that cannot be. The process has the code in either case."""
        content = dumps((key, data))
        path = self._path(key)
        part = path.with_name(f".{secrets.token_hex(8)}.part")
        try:
            try:
                part.write_bytes(hashlib.sha256(content).digest() + content)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            tell(f"{self._folder}: {error.strerror}. Compiled kernels are not kept: each run will compile them again.")


@contextlib.contextmanager
def kept(config: Any, caching: Any) -> Iterator[None]:
    """Have the functions that are declared in the block keep their code in `cache_folder`.

    `config` and `caching` are modules of the compiler, numba or numba.cuda. It looks both settings up when a function
    is declared.
    """
    before = config.CACHE_DIR, caching.IndexDataCacheFile
    config.CACHE_DIR, caching.IndexDataCacheFile = str(cache_folder()), CodeFiles
    try:
        yield
    finally:
        config.CACHE_DIR, caching.IndexDataCacheFile = before
