"""Live comparisons with transformers and rwkv7-hf, where they are installed: logits of folders that both read."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from naive import error_ratio

import rwkv_cli

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "rwkv7_hf")),
    reason="torch, transformers or rwkv7-hf is not installed (make test EXTRAS=dev,reference); tests/models has "
    "the same formulas in NumPy",
)

SIZES: dict[str, int] = {"width": 192, "head": 64, "vocab": 300, "ffn": 224, "seed": 7}
IDS = [0, *np.random.default_rng(4).integers(0, 200, 60).tolist()]


def run(*command: object) -> None:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def theirs(folder: Path) -> Any:
    (folder.parent / "ids.json").write_text(json.dumps(IDS))
    script = Path(__file__).parent / "run_transformers.py"
    run(script, folder, folder.parent / "ids.json", folder.parent / "logits.npy")
    return np.load(folder.parent / "logits.npy")


def ours(rwkv: Any, source: Path) -> Any:
    result = rwkv("convert", source, source.parent / "out", "--quant", "none", "--force")
    assert result.exit_code == 0, result.stderr
    return rwkv_cli.load(source.parent / "out").forward(IDS, all_logits=True)[0]


def folder4(folder: Path, settings: dict[str, Any]) -> Path:
    """RWKV-4 in the names of transformers' convert_rwkv_checkpoint_to_hf.py."""
    weights = tiny.weights("4", layers=8, **SIZES)
    if settings.get("tie_word_embeddings"):
        weights["head.weight"] = weights["emb.weight"]
    words = {
        "emb.": "embeddings.",
        "blocks.0.ln0": "blocks.0.pre_ln",
        ".att.": ".attention.",
        ".ffn.": ".feed_forward.",
    }
    words |= {"time_mix_k": "time_mix_key", "time_mix_v": "time_mix_value", "time_mix_r": "time_mix_receptance"}
    renamed = {}
    for name, array in weights.items():
        for word, longer in words.items():
            name = name.replace(word, longer)
        renamed[name if name == "head.weight" else f"rwkv.{name}"] = array
    if settings.get("tie_word_embeddings"):
        del renamed["head.weight"]
    folder.mkdir()
    tiny.write_pth(folder / "pytorch_model.bin", renamed, "F32")
    width, ffn = SIZES["width"], SIZES["ffn"]
    sizes = {"hidden_size": width, "attention_hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": 8}
    config = {"model_type": "rwkv", "vocab_size": 300, "tie_word_embeddings": False, **sizes, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "settings", [{"rescale_every": 6}, {"layer_norm_epsilon": 1e-2, "rescale_every": 0}, {"tie_word_embeddings": True}]
)
def test_transformers_runs_rwkv_4_the_same(tmp_path: Path, rwkv: Any, settings: dict[str, Any]) -> None:
    """`rescale_every` halves numbers on both sides of a product, so it changes nothing."""
    folder = folder4(tmp_path / "model", settings)
    assert error_ratio(ours(rwkv, folder), theirs(folder)) < 1e-5


def test_rwkv7_hf_runs_rwkv_7_the_same(tmp_path: Path, rwkv: Any) -> None:
    """Its converter makes a folder of the `.pth`, and both are the same model here."""
    source, folder = tmp_path / "model.pth", tmp_path / "model"
    tiny.write_pth(source, tiny.weights("7", layers=3, **SIZES), "F32")
    run("-m", "rwkv7_hf.converter", "--input", source, "--output", folder, "--precision", "fp32")
    want = theirs(folder)
    for each in (source, folder):
        assert error_ratio(ours(rwkv, each), want) < 1e-5


@pytest.mark.parametrize("name", ["transformers-rwkv4-tied", "fla7-tied"])
def test_tied_heads_of_other_programs(tmp_path: Path, rwkv: Any, shared: Path, name: str) -> None:
    if not (shared / "cases" / "interop" / name).is_dir():
        pytest.skip("no folders of other programs; the tests above cover a tied head")
    shutil.copytree(shared / "cases" / "interop" / name, tmp_path / "model")
    assert error_ratio(ours(rwkv, tmp_path / "model"), theirs(tmp_path / "model")) < 1e-5
