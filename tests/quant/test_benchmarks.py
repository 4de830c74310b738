"""The benchmarks of accuracy, on tiny models."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
from click.testing import Result

import rwkv_cli
from rwkv_cli.quant import Checkpoint

Run = Callable[..., Result]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def loaded(name: str) -> Any:
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_accuracy_takes_the_tokenizer_of_the_checkpoints_name(tmp_path: Path) -> None:
    """As it lies beside the bundled model."""
    bundled = Path(rwkv_cli.__file__).parent / "storyteller.tokenizer.json"
    (tmp_path / "a.tokenizer.json").write_bytes(bundled.read_bytes())
    vocab = len(json.loads(bundled.read_text())["model"]["vocab"])
    tiny.write_pth(tmp_path / "a.pth", tiny.weights("7", layers=1, width=64, ffn=128, vocab=vocab))
    (tmp_path / "text").write_text("Once upon a time there was a fox.")
    command = [sys.executable, BENCHMARKS / "accuracy.py", tmp_path / "a.pth", tmp_path / "text"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["int8", "Q8_0"]


def test_the_gguf_file_for_llama_is_the_same_model(rwkv: Run, tmp_path: Path) -> None:
    tiny.write_pth(tmp_path / "a.pth", tiny.weights("7", width=64))
    assert rwkv("convert", tmp_path / "a.pth", tmp_path / "a").exit_code == 0
    model = rwkv_cli.load(tmp_path / "a")
    loaded("llama").write_gguf(tmp_path / "a.pth", model.config, tmp_path / "b.gguf")
    assert rwkv("convert", tmp_path / "b.gguf", tmp_path / "b").exit_code == 0
    digests = {Checkpoint(tmp_path / name).digest for name in ("a", "b")}
    assert len(digests) == 1
