"""The benchmarks of accuracy, of tasks and of depth, on tiny models and on none."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result
from extras import needs

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
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["Q8_0", "int8", "q6", "q5", "q4"]


def test_the_gguf_file_for_llama_is_the_same_model(rwkv: Run, tmp_path: Path) -> None:
    tiny.write_pth(tmp_path / "a.pth", tiny.weights("7", width=64))
    assert rwkv("convert", tmp_path / "a.pth", tmp_path / "a").exit_code == 0
    model = rwkv_cli.load(tmp_path / "a")
    loaded("llama").write_gguf(tmp_path / "a.pth", model.config, tmp_path / "b.gguf")
    assert rwkv("convert", tmp_path / "b.gguf", tmp_path / "b").exit_code == 0
    digests = {Checkpoint(tmp_path / name).digest for name in ("a", "b")}
    assert len(digests) == 1


def test_the_tasks_of_a_text_are_right() -> None:
    words = [f"w{i}" for i in range(700)]
    made = dict(loaded("tasks").tasks_of(" ".join(words), 9))
    last, endings = made["last word"].items, made["which of four endings"].items
    assert (len(last), len(endings)) == (9, 9)
    for n, (word, ending) in enumerate(zip(last, endings, strict=True)):
        passage, following = words[68 * n : 68 * n + 60], words[68 * n + 60 : 68 * n + 68]
        assert (word.context.split(), word.endings) == (passage[:-1], (f" {passage[-1]}",))
        assert (ending.context.split(), ending.endings[ending.right].split()) == (passage, following)
        assert len(set(ending.endings)) == 4


class Reads:
    """A model that remembers how it was read to. Only `grows` lets it go on without reading."""

    def __init__(self, grows: bool) -> None:
        self.depth, self.grows, self.steps = 0, grows, list[int]()

    def read(self, tokens: int) -> None:
        self.depth += tokens
        self.steps.append(tokens)

    def memory(self) -> int:
        return 4 * self.depth

    def grow(self, depth: int) -> bool:
        self.depth = depth
        return self.grows


def test_what_is_not_read_has_no_time_of_reading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    depth = loaded("depth")
    reader = Reads(grows=True)
    rows = list(depth.measure(reader, 1e9, [0, 700]))
    assert reader.steps == [1] * 40 + [512, 148] + [1] * 40
    assert [(row["depth"], row["memory"]) for row in rows] == [(0, 160), (700, 2960)]
    assert None not in [row["read"] for row in rows]
    assert [row["read"] is None for row in depth.measure(Reads(grows=True), 0, [0, 700, 1000])] == [False, True, True]
    assert [row["depth"] for row in depth.measure(Reads(grows=False), 0, [0, 700])] == [0]
    needs("matplotlib", "dev")
    monkeypatch.syspath_prepend(BENCHMARKS)
    loaded("constant").draw(tmp_path / "a.svg", {"Mamba, llama.cpp Q8_0": rows, "RWKV-7, rwkv int8": rows})
    assert "Mamba, llama.cpp Q8_0" in (tmp_path / "a.svg").read_text()
