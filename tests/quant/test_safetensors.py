"""Sources as safetensors and as folders, with damaged weights, and files that are no checkpoint at all."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import Result
from damaged import read_or_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import refused

from rwkv_cli.quant import Checkpoint, writer

Run = Callable[..., Result]
few = settings(max_examples=60, deadline=None)
SMALL = tiny.weights("7", layers=1, width=16, vocab=256, head=8, ffn=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors")


@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("quant", ["int8", "none"])
def test_either_kind_of_file_gives_the_same_model(rwkv: Run, tmp_path: Path, version: str, quant: str) -> None:
    weights, dtype = tiny.weights(version, layers=2), {"4": "F32", "6": "F16"}.get(version, "BF16")
    shuffled = dict(sorted(weights.items(), reverse=True))
    sources = (
        tiny.write_pth(tmp_path / "a.pth", weights, dtype),
        tiny.write_safetensors(tmp_path / "b", shuffled, dtype),
    )
    for source in sources:
        result = rwkv("convert", source, source.with_suffix(".out"), "--quant", quant)
        assert result.exit_code == 0, result.stderr
    a, b = (Checkpoint(source.with_suffix(".out")) for source in sources)
    assert a.digest == b.digest
    assert re.fullmatch("sha256:[0-9a-f]{64}", a.digest)
    assert set(a.stored) == set(b.stored)
    for name, tensor in a.stored.items():
        assert tensor.dtype == b.stored[name].dtype
        np.testing.assert_array_equal(a.array(name), b.array(name))


def test_the_digest_is_of_the_values(rwkv: Run, tmp_path: Path) -> None:
    """Not of the dtype that they are stored in, nor of what they are quantized to; but of each single value."""
    whole = tiny.rounded(SMALL, "BF16")
    other = {name: array.copy() for name, array in whole.items()}
    other["head.weight"][255, 15] *= 2
    digests = []
    for weights, dtype, quant in (
        (whole, "BF16", "int8"),
        (whole, "F32", "none"),
        (other, "F32", "none"),
    ):
        source = tiny.write_safetensors(tmp_path / "a", weights, dtype)
        assert rwkv("convert", source, tmp_path / "b", "--force", "--quant", quant).exit_code == 0
        digests.append(Checkpoint(tmp_path / "b").digest)
    assert digests[0] == digests[1] != digests[2]


@few
@given(
    share=st.floats(0, 1, exclude_max=True),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3),
)
def test_cut_and_changed_files_are_refused_or_harmless(
    folder: Path, share: float, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(tiny.write_safetensors(folder / "whole", SMALL).read_bytes())
    end = int.from_bytes(data[:8], "little") + 8
    for at, byte in changes:
        data[int(at * end)] = byte
    path = folder / "changed"
    path.write_bytes(data if changes else data[: int(share * len(data))])
    assert not read_or_refused(path) or changes


def entry(dtype: str = "F32", shape: Any = (2,), start: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BROKEN = "broken or truncated safetensors file .*; download or convert again"


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": entry(start=8, end=16)}, BROKEN),
        ({"a": entry(end=12)}, BROKEN),
        ({"a": entry(end=4)}, BROKEN),
        ({"a": entry(end=1 << 62)}, BROKEN),
        ({"a": entry(start=8, end=0)}, BROKEN),
        ({"a": entry(start=-8, end=0)}, BROKEN),
        ({"a": entry(), "b": entry()}, BROKEN),
        ({"a": entry(), "b": entry(start=12, end=16, shape=[1])}, BROKEN),
        ({"a": entry(shape=[1 << 61])}, BROKEN),
        ({"a": entry(shape=[1 << 32, 1 << 32, 1 << 32])}, BROKEN),
        ({"a": entry(shape=[-2])}, BROKEN),
        ({"a": entry(shape="2")}, BROKEN),
        ({"a": entry(dtype="Q8")}, BROKEN),
        ({"a": [1]}, BROKEN),
        (b'{"a":', BROKEN),
        (b"{" * 999, BROKEN),
        (b'{"\xff":1}', BROKEN),
        ({"a": entry(shape=[2, *[1] * 70])}, "tensor a has 71 dimensions, more than any weight; download it again"),
        ({"a": entry(shape=[2, *[1] * 200_000])}, "tensor a has 200001 dimensions, more than any weight"),
        ({"a": entry(shape=[0, 1 << 62], end=0), "b": entry()}, "tensor a has the shape .*, larger than any weight"),
        ({"a\nb": entry()}, r"a tensor has the name 'a\\nb'; download"),
        ({"a": entry(dtype="I64", shape=[1])}, "tensor a is I64; save it again as F32, F16 or BF16"),
        ({"a": entry(dtype="I32")}, "tensor a is I32; save it again as F32, F16 or BF16"),
        ({"a": entry(dtype="U16", shape=[4])}, "tensor a is U16; save it again as F32, F16 or BF16"),
        ({"a": entry(dtype="I8", shape=[8])}, "tensor a is I8; save it again as F32, F16 or BF16"),
        ({"a": entry(dtype="F8_E4M3", shape=[8])}, "tensor a is F8_E4M3; save it again as F32, F16 or BF16"),
    ],
)
def test_a_header_that_lies_is_refused(rwkv: Run, tmp_path: Path, header: Any, says: str) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    refused(rwkv("convert", tmp_path / "a"), tmp_path / "a", says)
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.parametrize("length", [0, 1, 300, 1 << 31, (1 << 63) - 1, (1 << 64) - 1])
def test_a_wrong_header_length_is_refused(rwkv: Run, tmp_path: Path, length: int) -> None:
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + b'{"a":1}' + bytes(200))
    refused(rwkv("convert", tmp_path / "a"), tmp_path / "a", BROKEN)


@pytest.mark.parametrize("quant", ["int8", "q5", "none"])
def test_blocks_do_not_show(rwkv: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str) -> None:
    source = tiny.write_safetensors(tmp_path / "a", SMALL)
    assert rwkv("convert", source, tmp_path / "whole", "--quant", quant, "--calibrate", "none").exit_code == 0
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 300)
    assert rwkv("convert", source, tmp_path / "parts", "--quant", quant, "--calibrate", "none").exit_code == 0
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()


DAMAGED = "holds NaN or infinity; the file is damaged, download it again"


@pytest.mark.parametrize("quant", ["int8", "none"])
@pytest.mark.parametrize(
    ("version", "name", "value", "says"),
    [
        ("7", "emb.weight", np.nan, DAMAGED),
        ("7", "blocks.0.ffn.value.weight", np.inf, DAMAGED),
        ("7", "blocks.0.att.w2", -np.inf, DAMAGED),
        ("7", "ln_out.bias", np.nan, DAMAGED),
        ("6", "blocks.0.att.time_maa_w2", np.nan, DAMAGED),
        ("4", "blocks.0.att.time_decay", -np.inf, DAMAGED),  # exp makes 0 of it
        ("5.0", "blocks.0.att.time_decay", np.inf, DAMAGED),
        ("5.0", "blocks.0.att.time_first", -np.inf, DAMAGED),
        ("5.2", "blocks.0.att.time_decay", np.inf, DAMAGED),
        ("4", "blocks.0.att.time_decay", 99, DAMAGED),  # exp overflows
        ("7", "head.weight", 1e11, r"holds a value of 1\.0e\+11; the file is damaged, download it again"),
    ],
)
def test_damaged_weights_are_named(
    rwkv: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str, version: str, name: str, value: float,
    says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 300)
    weights = tiny.weights(version, layers=1, width=16, vocab=256, head=8, ffn=32)
    weights[name].flat[-1] = value  # in the last block
    path = tiny.write_safetensors(tmp_path / "a", weights, "F32")
    refused(rwkv("convert", path, "--quant", quant), rf"{path}: tensor {re.escape(name)}\S* {says}")
    assert list(tmp_path.iterdir()) == [path]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 384000000\n"
FOREIGN = {
    LFS: "a Git-LFS pointer, not the file itself; run `git lfs pull` or download the file",
    b"<!DOCTYPE html><html>": "a web page saved under this name; download the file itself",
    b"\n  <html lang=en>": "a web page saved under this name; download the file itself",
    b"<?xml version='1.0'?><Error>": "a web page saved under this name; download the file itself",
    b"": "the file is empty; download it again",
    b"GGUF\x03\0\0\0" + bytes(9): "the file is truncated or damaged; download it again",
    b"fmgg" + bytes(50): r"an rwkv\.cpp file of version 0; versions 100 and 101 are read",
    b"ggmf" + bytes(50): r"a big-endian or very old file of ggml; convert from the original \.pth",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": r"broken or truncated torch file \(its pickle makes no sense\)",
    b"PK": r"neither a torch \.pth nor a safetensors or GGUF file; give a checkpoint, or download it again",
    b"{": BROKEN,
    bytes(600): "neither a torch",
    b'{"error": "not found"}': "neither a torch",
    b"Once upon a time": "neither a torch",
}


@pytest.mark.parametrize("content", FOREIGN, ids=lambda content: repr(content[:12]))
def test_what_is_no_checkpoint_is_named(rwkv: Run, tmp_path: Path, content: bytes) -> None:
    """By every command that opens a model, whatever the file is called."""
    for name in ("a.pth", "a.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        for arguments in (("convert", path), ("info", path), ("generate", "hi", "-m", path)):
            refused(rwkv(*arguments), path, FOREIGN[content])
        path.unlink()
    assert not list(tmp_path.iterdir())


def test_a_converted_file_is_not_converted_again(rwkv: Run, byte_model: Path, tmp_path: Path) -> None:
    result = rwkv("convert", byte_model, tmp_path / "b")
    refused(result, byte_model, "already converted; run it with -m, or convert from the original")
    assert not list(tmp_path.iterdir())


def shards(folder: Path, pattern: str) -> dict[str, list[str]]:
    """A model in two files with an index, as Hugging Face names them; which tensors are in which."""
    write, ending = (tiny.write_safetensors, "safetensors") if pattern == "model" else (tiny.write_pth, "bin")
    names, folder = list(SMALL), folder / "model"
    folder.mkdir()
    parts = {
        f"{pattern}-00001-of-00002.{ending}": names[: len(names) // 2],
        f"{pattern}-00002-of-00002.{ending}": names[len(names) // 2 :],
    }
    for file, part in parts.items():
        write(folder / file, {name: SMALL[name] for name in part}, "F32")
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / f"{pattern}.{ending}.index.json").write_text(json.dumps(index))
    return parts


@pytest.mark.parametrize("pattern", ["model", "pytorch_model"])
def test_shards_make_one_model(rwkv: Run, tmp_path: Path, pattern: str) -> None:
    files = sorted(shards(tmp_path, pattern))
    result = rwkv("convert", tmp_path / "model")
    assert result.exit_code == 0, result.stderr
    assert f"Wrote {tmp_path / 'model.int8.safetensors'}\n" in result.stderr
    whole = tiny.write_pth(tmp_path / "whole.pth", SMALL, "F32")
    assert rwkv("convert", whole).exit_code == 0
    digests = {Checkpoint(tmp_path / f"{name}.int8.safetensors").digest for name in ("model", "whole")}
    assert len(digests) == 1
    (tmp_path / "model" / files[1]).unlink()
    refused(rwkv("convert", tmp_path / "model", "--force"), r"index\.json: tensors of shard", files[1], "download")
    (tmp_path / "model" / files[1]).write_bytes(LFS)
    refused(rwkv("convert", tmp_path / "model", "--force"), files[1], "a Git-LFS pointer")


@pytest.mark.parametrize(
    "index",
    [b"", b"\xff", b"[]", b"{}", b'{"weight_map": 7}', b'{"weight_map": ["a"]}', b'{"weight_map": {"a": [], "b": 1}}',
     b'{"weight_map": ' + b"[" * 100_000],
    ids=range(8),
)  # fmt: skip
def test_a_broken_index_is_refused(rwkv: Run, tmp_path: Path, index: bytes) -> None:
    shards(tmp_path, "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_bytes(index)
    refused(rwkv("convert", tmp_path / "model"), r"index\.json: not a readable shard index; download")


def test_a_folder_must_hold_one_model(rwkv: Run, tmp_path: Path, byte_model: Path) -> None:
    refused(rwkv("convert", tmp_path), rf"{tmp_path}: no \*\.safetensors, .* in this folder")
    refused(rwkv("info", tmp_path), rf"{tmp_path}: no \*\.safetensors, .* in this folder")
    a, b = (tiny.write_pth(tmp_path / name, SMALL) for name in ("a.pth", "b.pth"))
    refused(rwkv("convert", tmp_path), tmp_path, r"holds 2 \.pth files; name the one to convert")
    b.unlink()
    assert rwkv("convert", tmp_path, "--dry-run").exit_code == 0
    refused(rwkv("info", tmp_path), tmp_path, "not a converted model; convert it first: rwkv convert")
    for name in ("c.safetensors", "d.safetensors"):
        tiny.write_safetensors(tmp_path / name, SMALL)
    refused(rwkv("convert", tmp_path), r"d\.safetensors: tensor emb\.weight is also in c\.safetensors")
    (tmp_path / "d.safetensors").write_bytes(byte_model.read_bytes())
    refused(rwkv("convert", tmp_path), r"holds c\.safetensors and a\.pth; name the one to convert")
    refused(rwkv("convert", tmp_path / "d.safetensors"), r"d\.safetensors: already converted")
    assert sorted(tmp_path.iterdir()) == [a, tmp_path / "c.safetensors", tmp_path / "d.safetensors"]
