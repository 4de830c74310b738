"""rwkv convert: where it writes, what it takes along, and that a failure leaves everything as it was."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tokenizers
from click.testing import Result

from rwkv_cli.quant import Checkpoint

Run = Callable[..., Result]
Patch = pytest.MonkeyPatch
SIZES = {"layers": 1, "width": 16, "head": 8, "ffn": 32}
SMALL = tiny.weights("7", vocab=256, **SIZES)
DIVERTED = (signal.SIGTERM, signal.SIGHUP)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(rwkv: Run, folder: Path, *arguments: object, says: str) -> None:
    """One sentence on standard error, and everything in the folder as it was."""
    before = files(folder)
    result = rwkv("convert", *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(f"(Compiling kernels .*\n)?Error: .*{says}.*\n", result.stderr), result.stderr
    assert files(folder) == before


def accepted(rwkv: Run, *arguments: object) -> Result:
    result = rwkv("convert", *arguments)
    assert result.exit_code == 0, result.stderr
    return result


def process(first: str, *arguments: Any) -> list[Any]:
    """The command as a process of its own that does `first` before."""
    return [sys.executable, "-c", f"{first}; from rwkv_cli.main import main; main()", "convert", *arguments]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write_pth(tmp_path / "RWKV-x070-g1.0.pth", SMALL)


def test_it_writes_beside_the_source(rwkv: Run, tmp_path: Path, source: Path, monkeypatch: Patch) -> None:
    old = os.umask(0o027)
    result = accepted(rwkv, source)
    os.umask(old)
    assert result.stdout.startswith("architecture     RWKV-7\n")
    assert f"Wrote {tmp_path}/RWKV-x070-g1.0.int8.safetensors\n" in result.stderr
    assert (tmp_path / "RWKV-x070-g1.0.int8.safetensors").stat().st_mode & 0o777 == 0o640
    accepted(rwkv, source, "--quant", "none")
    cache = tmp_path / "cache" / "snapshot"
    cache.mkdir(parents=True)
    (cache / source.name).symlink_to(source.rename(tmp_path / "4f9fc0c"))
    accepted(rwkv, cache / source.name)
    model = Checkpoint(cache / "RWKV-x070-g1.0.int8.safetensors")
    assert [model.metadata(key, str) for key in ("source", "template")] == ["RWKV-x070-g1.0.pth", "g1"]
    monkeypatch.chdir(cache)
    (cache / "RWKV-x070-g1.0.int8.safetensors").unlink()
    accepted(rwkv, ".")
    accepted(rwkv, source.name, "x")
    names = {"4f9fc0c", "RWKV-x070-g1.0.int8.safetensors", "RWKV-x070-g1.0.float.safetensors",
             "cache/snapshot.int8.safetensors", "cache/snapshot/x", "cache/snapshot/RWKV-x070-g1.0.pth"}  # fmt: skip
    assert set(files(tmp_path)) == names


def test_a_dry_run_writes_nothing(rwkv: Run, tmp_path: Path, source: Path) -> None:
    before = files(tmp_path)
    result = accepted(rwkv, source, "--dry-run")
    assert "parameters" in result.stdout
    assert result.stderr == f"Dry run: {tmp_path}/RWKV-x070-g1.0.int8.safetensors was not written.\n"
    assert files(tmp_path) == before
    (tmp_path / "b").write_text("kept")
    accepted(rwkv, source, tmp_path / "b", "--dry-run", "--force")
    assert files(tmp_path) == before | {"b": b"kept"}


def test_only_force_replaces(rwkv: Run, tmp_path: Path, source: Path) -> None:
    (tmp_path / "b").write_text("kept")
    refused(rwkv, tmp_path, source, tmp_path / "b", says="b exists; give --force to replace it, or another DST")
    (tmp_path / "link").symlink_to("nowhere")
    refused(rwkv, tmp_path, source, tmp_path / "link", says="link exists; give --force to replace it")
    accepted(rwkv, source, tmp_path / "b", "--force")
    accepted(rwkv, source, tmp_path / "c")
    assert files(tmp_path)["b"] == files(tmp_path)["c"]


def test_a_failing_conversion_keeps_what_it_was_to_replace(rwkv: Run, tmp_path: Path, source: Path) -> None:
    accepted(rwkv, source, tmp_path / "b")
    damaged = SMALL | {"head.weight": np.full_like(SMALL["head.weight"], np.nan)}
    tiny.write_pth(source, damaged, "F32")
    for dst, option in (("b", "--force"), ("c", "--force"), ("c", "--quant=none")):
        refused(rwkv, tmp_path, source, tmp_path / dst, option, says=r"tensor head\.weight holds NaN or infinity")


def test_a_destination_that_cannot_be_is_refused(rwkv: Run, tmp_path: Path, source: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(rwkv, tmp_path, source, tmp_path / "folder", says="folder is a folder; give the name of a file as DST")
    refused(rwkv, tmp_path, source, tmp_path / "folder", "--force", says="folder is a folder; give the name of a file")
    refused(rwkv, tmp_path, source, tmp_path / "no" / "b", says="no is not a folder; make it first, or give another")
    refused(rwkv, tmp_path, source, source / "b", says=r"\.pth is not a folder; make it first, or give another DST")
    refused(rwkv, tmp_path, tmp_path / "none.pth", says=r"none\.pth: No such file or directory")
    refused(rwkv, tmp_path, source, tmp_path / ("x" * 256), says="File name too long")
    accepted(rwkv, source, tmp_path / ("x" * 255))


def test_the_source_is_never_the_destination(rwkv: Run, tmp_path: Path, source: Path) -> None:
    (tmp_path / "soft").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    (tmp_path / "hf").mkdir()
    shard = tiny.write_safetensors(tmp_path / "hf" / "model.safetensors", SMALL)
    for src, dst in ((source, source), (source, tmp_path / "soft"), (source, tmp_path / "hard"), (shard, shard),
                     (tmp_path / "soft", source), (tmp_path / "hf", shard)):  # fmt: skip
        for option in ("--force", "--dry-run", "--quant=none"):
            refused(rwkv, tmp_path, src, dst, option, says=f"{dst.name} is the source itself; give another DST")


def broken(number: int, *_: Any, **__: Any) -> Any:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("rwkv_cli.quant.writer._Stream.append", errno.ENOSPC),
        ("os.fsync", errno.EIO),
        ("os.fsync", errno.ENOSPC),
        ("pathlib.Path.replace", errno.EACCES),
    ],
)
def test_what_the_system_refuses_is_undone(
    rwkv: Run, tmp_path: Path, source: Path, monkeypatch: Patch, what: str, number: int, force: bool
) -> None:
    monkeypatch.setattr(what, lambda *_, **__: broken(number))
    monkeypatch.setattr("os.link", lambda *_: broken(errno.EPERM))
    if force:
        (tmp_path / "b").write_text("kept")
    says = f"{tmp_path}/b: {os.strerror(number)}; nothing was written"
    refused(rwkv, tmp_path, source, tmp_path / "b", *(["--force"] if force else []), says=says)


def test_a_full_disk_is_told_before_and_while_writing(rwkv: Run, tmp_path: Path, monkeypatch: Patch) -> None:
    source = tiny.write_pth(tmp_path / "a.pth", tiny.weights("7", vocab=256, width=64, layers=4))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))"
    command = process(limit, source, tmp_path / "b", "--quant", "none")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: {tmp_path}/b: File too large; nothing was written\n"
    assert list(tmp_path.iterdir()) == [source]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    says = r"b: needs \d\.\d\d GB, but its disk has 0\.00 GB free; give a DST on another"
    refused(rwkv, tmp_path, source, tmp_path / "b", says=says)


@pytest.mark.parametrize("denied", ["source", "folder"])
def test_a_lack_of_permission_is_told(rwkv: Run, tmp_path: Path, source: Path, monkeypatch: Patch, denied: str) -> None:
    before, opened = files(tmp_path), Path.open

    def guarded(path: Path, mode: str = "r", **options: Any) -> Any:
        if path == source if denied == "source" else "x" in mode:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", guarded)
    result = rwkv("convert", source, tmp_path / "b")
    monkeypatch.undo()
    says = {"source": f"{source}: Permission denied", "folder": f"{tmp_path}/b: Permission denied; nothing was written"}
    assert (result.exit_code, result.stderr) == (1, f"Error: {says[denied]}\n")
    assert files(tmp_path) == before


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("appears", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(
    rwkv: Run, tmp_path: Path, source: Path, monkeypatch: Patch, links: bool, appears: bool
) -> None:
    """Also where the file system knows no hard links."""
    sync = os.fsync
    if appears:
        monkeypatch.setattr("os.fsync", lambda number: (sync(number), (tmp_path / "b").write_text("kept")))
    if not links:
        monkeypatch.setattr("os.link", lambda *_: broken(errno.EPERM))
    result = rwkv("convert", source, tmp_path / "b")
    assert set(files(tmp_path)) == {source.name, "b"}
    assert result.exit_code == int(appears)
    if appears:
        assert result.stderr == f"Error: {tmp_path}/b exists; give --force to replace it, or another DST\n"
        assert (tmp_path / "b").read_text() == "kept"
    else:
        Checkpoint(tmp_path / "b")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_killed_conversion_leaves_the_destination_as_it_was(tmp_path: Path, sent: signal.Signals) -> None:
    tree = {}
    for name, array in tiny.weights("7", layers=1, width=64, head=64, vocab=256, ffn=64).items():
        shape = tuple({64: 512, 256: 65536}.get(n, n) for n in array.shape) if name[-3:] != "r_k" else (8, 64)
        tree[name] = tiny.tensor("0", "BF16", 40 << 20, 0, shape, tiny.contiguous(shape))  # all share a storage
    tiny.write_zip(tmp_path / "a.pth", tree, {"0": tiny.raw(np.ones(40 << 20, np.float32), "BF16")})
    (tmp_path / "b").write_text("kept")
    # as in a terminal, whatever this process ignores
    usual = "from signal import *; signal(SIGTERM, SIG_DFL); signal(SIGHUP, SIG_DFL)"
    command = process(usual, "a.pth", "b", "--force")
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(sent)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == {signal.SIGKILL: -9, signal.SIGINT: 1}.get(sent, 128 + sent)
    assert "Traceback" not in stderr
    assert "Wrote" not in stderr
    assert (tmp_path / "b").read_text() == "kept"
    if sent != signal.SIGKILL:
        assert set(files(tmp_path)) == {"a.pth", "b"}


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_an_ignored_signal_stays_ignored(rwkv: Run, source: Path, monkeypatch: Patch, handler: Any) -> None:
    sync, during = os.fsync, set()
    monkeypatch.setattr("os.fsync", lambda number: (sync(number), during.update(map(signal.getsignal, DIVERTED))))
    before = [signal.signal(number, handler) for number in DIVERTED]
    accepted(rwkv, source)
    after = {signal.signal(number, old) for number, old in zip(DIVERTED, before, strict=True)}
    assert after == {handler}
    assert (during == {handler}) == (handler == signal.SIG_IGN)


def json_tokenizer(path: Path, size: int) -> Path:
    """A tokenizer.json of so many words."""
    words = {f"w{i}": i for i in range(size)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0")).save(str(path))
    return path


@pytest.mark.parametrize(
    ("vocab", "beside", "size", "kind"),
    [
        (256, "", 0, "bytes"), (65536, "", 0, "world"), (300, "", 0, "none"), (300, "other.json", 300, "none"),
        (300, "tokenizer.json", 300, "json"), (811, "tokenizer.json", 300, "json"),
        (812, "tokenizer.json", 300, "none"), (300, "tokenizer.json", 301, "none"),
        (256, "tokenizer.json", 300, "bytes"), (256, "tokenizer.json", 99, "json"),
        (65536, "tokenizer.json", 300, "world"), (300, "20B_tokenizer.json", 300, "json"), 
        (300, "a.tokenizer.json", 300, "json"), (300, "b.tokenizer.json", 300, "none"),
    ],
)  # fmt: skip
def test_the_tokenizer_is_found(rwkv: Run, tmp_path: Path, vocab: int, beside: str, size: int, kind: str) -> None:
    path = tiny.write_pth(tmp_path / "a.pth", tiny.weights("7", vocab=vocab, **SIZES))
    if beside:
        json_tokenizer(tmp_path / beside, size)
    result = accepted(rwkv, path)
    model = Checkpoint(tmp_path / "a.int8.safetensors")
    assert model.metadata("tokenizer", str) == kind
    assert f"vocabulary       {vocab}, tokenizer {kind}, chat template" in result.stdout
    warning = f"Warning: no tokenizer fits the vocabulary of {vocab}; "
    assert result.stderr.count(warning) == (kind == "none")
    if kind == "json":
        assert model.array("tokenizer.json").tobytes() == (tmp_path / beside).read_bytes()


BYTES = b"".join(b"%d %r 1\n" % (i + 1, bytes([i])) for i in range(256))
TOKENIZERS = {
    b"": "a vocabulary without tokens",
    b'{"1": 7}': "not a vocabulary: token 1 is 7",
    b'{"1": ""}': "not a vocabulary: token 1 is ''",
    b'{"1": [256]}': r"not a vocabulary: token 1 is \[256\]",
    b'{"99999999": "a"}': "not a vocabulary: token 99999999 is 'a'",
    BYTES + b"257 'ab' 3\n": "not a World vocabulary: line",
    BYTES + b"257 ab 2\n": "not a World vocabulary: line",
    BYTES + b"256 'ab' 2\n": "not a World vocabulary: line",
    BYTES + b"99999999999 'ab' 2\n": "not a World vocabulary: line",
    BYTES + b"257 __import__('os').system('touch ran') 2\n": "not a World vocabulary: line",
    BYTES + b"257 " + b"(" * 10_000 + b" 2\n": "not a World vocabulary: line",
    b"<!doctype html>\n": "not a World vocabulary: line",
    bytes(range(256)): "not a World vocabulary: line",
    b'{"model": 7}': "not a tokenizer.json",
    b'{"version": "1.0", ': "not a tokenizer.json",
}


@pytest.mark.parametrize("content", TOKENIZERS, ids=lambda content: repr(content[-12:]))
def test_a_broken_tokenizer_is_refused(rwkv: Run, tmp_path: Path, source: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    for arguments in (("--tokenizer", path), ()):
        says = f"{path}: {TOKENIZERS[content]}.*; give a sound one with --tokenizer"
        refused(rwkv, tmp_path, source, *arguments, says=says)


def test_a_tokenizer_must_fit(rwkv: Run, tmp_path: Path, source: Path) -> None:
    large = json_tokenizer(tmp_path / "large", 257)
    says = "large: has ids up to 256, but the model's vocabulary is 256"
    refused(rwkv, tmp_path, source, "--tokenizer", large, says=says)
    says = r"\.txt: has ids up to 65529, but the model's vocabulary is 256"
    refused(rwkv, tmp_path, source, "--tokenizer", "world", says=says)
    refused(rwkv, tmp_path, source, "--tokenizer", tmp_path / "no", says="no: No such file or directory")
    refused(rwkv, tmp_path, source, "--tokenizer", tmp_path, says=": Is a directory")
    (tmp_path / "vocabulary").write_bytes(BYTES)
    wide = tiny.write_pth(tmp_path / "wide.pth", tiny.weights("7", vocab=257, **SIZES))
    for name, kind in (("large", "json"), ("vocabulary", "world")):
        accepted(rwkv, wide, tmp_path / "b", "--force", "--tokenizer", tmp_path / name)
        assert Checkpoint(tmp_path / "b").metadata("tokenizer", str) == kind
    assert json.loads(rwkv("info", tmp_path / "b", "--json").stdout)["tokenizer"] == "world"
