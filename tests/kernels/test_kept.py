"""Compiled code on disk is used only as it was written, and a disk that takes none of it is named."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
from numba.core import caching

from rwkv_cli.kernels import cache, kept
from rwkv_cli.kernels.cache import config
from rwkv_cli.kernels.cpu import columns, matmul, packed
from rwkv_cli.kernels.cpu.compile import function


def thrice(n: int) -> int:
    return n * 3


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The sentences about the folder of compiled kernels, which is this test's own."""
    sentences: list[str] = []
    monkeypatch.setattr(kept, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(cache, "_LISTENERS", [sentences.append])
    monkeypatch.setattr(cache, "_SAID", set())
    return sentences


def declared() -> Any:
    """The function, compiled or read."""
    with kept.kept(config, caching):
        return numba.njit("int64(int64)", cache=True)(thrice)


def flipped(content: bytes) -> bytes:
    return content[:900] + bytes([content[900] ^ 1]) + content[901:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda content: content[: len(content) // 2],
        lambda content: bytes(len(content)),
        flipped,
        lambda content: content[32:],
        lambda _: b"cos\nsystem\n(S'false'\ntR.",
    ],
    ids=["empty", "half", "zeros", "one bit", "no checksum", "another pickle"],
)
def test_damaged_code_is_compiled_again(damage: Callable[[bytes], bytes], said: list[str], tmp_path: Path) -> None:
    declared()
    (path,) = tmp_path.rglob("*.code")
    whole = path.read_bytes()
    assert declared().stats.cache_hits
    assert said == []
    path.write_bytes(damage(whole))
    for _ in range(2):
        assert declared()(14) == 42
    (sentence,) = said
    assert "a compiled kernel there was damaged" in sentence
    assert str(path.parent) in sentence
    assert declared().stats.cache_hits
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["write_bytes", "replace"])
def test_a_full_disk_is_named_and_the_code_runs(
    call: str, error: int, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(error, "it failed")

    monkeypatch.setattr(Path, call, fail)
    for _ in range(2):
        assert declared()(14) == 42
    (sentence,) = said
    assert sentence.startswith(str(tmp_path))
    assert "it failed. Compiled kernels are not kept" in sentence
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_the_cache_of_another_declaration_is_numbas_own(said: list[str]) -> None:
    before = caching.IndexDataCacheFile
    declared()
    assert caching.IndexDataCacheFile is before
    assert said == []


def test_another_folder_than_that_on_a_full_disk_is_named(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.mkdir

    def fail(path: Path, *args: Any, **options: Any) -> None:
        if path == tmp_path / "full":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", fail)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "full"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))  # type: ignore[attr-defined]
    folder = cache.cache_folder.__wrapped__()
    assert said == [f"{tmp_path}/full: No space left on device. Compiled kernels are kept in {folder} instead."]


def test_functions_of_one_line_are_told_apart() -> None:
    """Each process numbers what it compiles anew. So kernels of several, read from the cache, know a callee by name."""
    made = [matmul._multiply, columns._multiply, packed._multiply_8, packed._multiply_15]
    assert len({each.py_func.__qualname__ for each in made}) == len(made)


def test_a_function_that_is_made_several_times_needs_a_name() -> None:
    n = 3
    with pytest.raises(ValueError, match="needs a name"):
        function()(lambda x: x + n)
