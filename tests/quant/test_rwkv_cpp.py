"""Files of rwkv.cpp, written by its documented layout, are the same models as their `.pth`."""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from click.testing import Result
from foreign import write_bin

import rwkv_cli
from rwkv_cli.quant import Checkpoint, open_source

Run = Callable[..., Result]
SIZES = {"width": 64, "head": 16, "ffn": 128, "vocab": 256}


def logits(rwkv: Run, path: Path, ids: Sequence[int] = (1, 200, 3)) -> Any:
    result = rwkv("convert", path, path.parent / "out", "--quant", "none", "--force")
    assert result.exit_code == 0, result.stderr
    model = rwkv_cli.load(path.parent / "out")
    return model.advance(list(ids), model.new_state())


HEADS = [(version, 16) for version in ("4", "5.0", "5.2", "6", "7")]
ONE_HEAD = [(version, 64) for version in ("4", "5.0", "5.2", "7")]  # rwkv.cpp's converter fails for RWKV-6 with one


@pytest.mark.parametrize(("version", "head"), HEADS + ONE_HEAD)
@pytest.mark.parametrize("form", [100, 101])
def test_a_float_file_is_the_same_model(rwkv: Run, tmp_path: Path, version: str, head: int, form: int) -> None:
    """Its decay in v4 and v5 has been computed and is computed back, so that logits agree to rounding."""
    weights = tiny.weights(version, **{**SIZES, "head": head})
    expected = logits(rwkv, tiny.write_pth(tmp_path / "a.pth", weights, "F32"))
    digest = Checkpoint(tmp_path / "out").digest
    found = logits(rwkv, write_bin(tmp_path / "a.bin", version, weights, form=form))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    if version in ("6", "7"):
        assert Checkpoint(tmp_path / "out").digest == digest


def test_decays_that_float32_rounds_to_0_and_1_come_back(tmp_path: Path) -> None:
    for version, low in (("5.2", -30.0), ("4", -200.0)):
        weights = tiny.weights(version, **SIZES)
        decay = weights["blocks.0.att.time_decay"]
        decay.flat[:2] = low, 6.0
        found = open_source(write_bin(tmp_path / "a", version, weights))["blocks.0.att.time_decay"].float32()
        again = [-np.exp(a.astype(np.float64)) for a in (found.reshape(decay.shape), decay)]
        again = again if version == "4" else [np.exp(a) for a in again]
        np.testing.assert_allclose(*again, rtol=1e-6, atol=1e-30 if version == "4" else 1e-38)


@pytest.mark.parametrize("version", ["4", "6", "7"])
@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_rounded_files_are_read(tmp_path: Path, version: str, kind: str) -> None:
    """Each matrix is what the `gguf` package reads of it, also where it lies turned."""
    weights = tiny.weights(version, **SIZES)
    found = open_source(write_bin(tmp_path / "a", version, weights, kind))
    chosen = gguf.GGMLQuantizationType[kind]
    names = ["blocks.0.att.key.weight", "blocks.2.ffn.value.weight"]
    for name in [*names, *(["blocks.1.att.time_maa_w1"] if version == "6" else [])]:
        array = weights[name]
        there = np.ascontiguousarray(array.T if "time" in name else array)
        read = gguf.dequantize(gguf.quantize(there, chosen), chosen)
        np.testing.assert_array_equal(found[name].float32(), read.T if "time" in name else read)
        assert found[name].shape == array.shape


@pytest.mark.parametrize(
    ("name", "version"), [("4v0-660K", "4"), ("5v1-730K", "5.0"), ("5v2-730K", "5.2"), ("7v0-834K", "7")]
)
def test_real_models_give_the_logits_of_the_reference(
    rwkv: Run, tmp_path: Path, shared: Path, name: str, version: str
) -> None:
    source = shared / "checkpoints" / f"tiny-rwkv-{name}.pth"
    golden = json.loads(source.with_suffix(".golden.json").read_text())
    tensors = {name: tensor.float32() for name, tensor in open_source(source).items()}
    found = logits(rwkv, write_bin(tmp_path / "a.bin", version, tensors), golden["prompt_ids"])
    np.testing.assert_allclose(found, golden["logits"], rtol=0, atol=1e-5)


def test_what_is_damaged_or_too_old_is_named(rwkv: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    weights = tiny.weights("7", **SIZES)

    def named(data: bytes, says: str) -> None:
        path.write_bytes(data)
        tiny.refused(rwkv("convert", path), path, says)
        tiny.refused(rwkv("info", path), path, says)

    old = write_bin(path, "7", weights, "Q8_0", form=100).read_bytes()
    named(
        old, r"tensor blocks\.0\.att\.receptance\.weight is Q8_0 of version 100, which is not read; quantize .* again"
    )
    data = write_bin(path, "7", weights).read_bytes()
    named(
        data[:4] + struct.pack("<I", 102) + data[8:], "an rwkv.cpp file of version 102; versions 100 and 101 are read"
    )
    named(data[:-100], "the file is truncated or damaged; download it again")
    named(data[:20], "the file is truncated or damaged")
    named(data[:24], "its header does not fit its tensors: the file is truncated")
    named(data[:8] + struct.pack("<I", 255) + data[12:], "its header does not fit its tensors")
    named(data[:32] + struct.pack("<I", 5) + data[36:], "tensor emb.weight is Q4_2, which is not read")
    named(data[:32] + struct.pack("<I", 77) + data[36:], "tensor emb.weight is of the unknown type 77")
    named(data[:24] + struct.pack("<I", 9) + data[28:], "the file is truncated or damaged")
    named(data + data[24 : 24 + 12 + 8 + 10 + 256 * 64 * 4], "tensor emb.weight is there twice")
    del weights["head.weight"]
    tiny.refused(rwkv("convert", write_bin(path, "7", weights)), path, "tensor head.weight is missing")


def test_no_damage_is_a_traceback(rwkv: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    data = write_bin(path, "5.2", tiny.weights("5.2", layers=1, **SIZES)).read_bytes()
    heads = [at for at in range(len(data)) if data[at : at + 6] in (b"blocks", b"ln_out", b"emb.we", b"head.w")]
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(data)
        broken[max(0, rng.choice(heads) - rng.integers(1, 24))] = rng.integers(256)
        path.write_bytes(broken[: rng.integers(1, len(data))] if rng.random() < 0.2 else broken)
        result = rwkv("convert", path, "--dry-run")
        assert result.exit_code == 0 or result.stderr.startswith("Error: "), result.stderr


def test_a_decay_is_never_read_in_part(rwkv: Run, tmp_path: Path) -> None:
    """Its last axis has one number in every file."""
    path = tmp_path / "a.bin"
    data = write_bin(path, "5.2", tiny.weights("5.2", layers=1, **SIZES)).read_bytes()
    name = b"blocks.0.att.time_decay"
    at = data.index(name)
    end = at + len(name) + 64 * 4
    path.write_bytes(
        data[: at - 12] + struct.pack("<I", 2) + data[at - 8 : end] + data[at + len(name) : end] + data[end:]
    )
    tiny.refused(rwkv("convert", path, "--dry-run"), path, "tensor blocks.0.att.time_decay has the shape")
