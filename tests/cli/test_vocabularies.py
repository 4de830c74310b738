"""Vocabularies of a model's own: beside it, as text or JSON, with some bytes missing; and its end tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import Result
from tiny import refused

import rwkv_cli
from rwkv_cli.quant import Checkpoint

Run = Callable[..., Result]
PUZZLE = "1 '\\n' 1\n2 '<board>\\n' 8\n3 '1 ' 2\n4 '10 ' 3\n5 '1' 1\n"
AS_JSON = {"1": "\n", "2": "<board>\n", "3": [49, 32], "4": "10 ", "5": "1"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tiny.write_pth(tmp_path / "model" / "a.pth", tiny.weights("7", layers=1, vocab=300))


def load(rwkv: Run, source: Path, *options: object) -> Any:
    result = rwkv("convert", source, source.with_suffix(".out"), "--force", *options)
    assert (result.exit_code, result.stderr.count("Warning")) == (0, 0), result.stderr
    return rwkv_cli.load(source.with_suffix(".out"))


@pytest.mark.parametrize("form", ["text", "utf-8", "utf-16"])
def test_a_vocabulary_need_not_have_every_byte(rwkv: Run, tmp_path: Path, source: Path, form: str) -> None:
    path = tmp_path / "vocabulary"
    path.write_text(PUZZLE if form == "text" else json.dumps(AS_JSON), encoding="utf-8" if form == "text" else form)
    model = load(rwkv, source, "--tokenizer", path)
    assert model.tokenizer.encode("<board>\n10 1 11 \n") == [2, 4, 3, 5, 3, 1]
    assert model.tokenizer.decode([2, 4, 5]) == "<board>\n10 1"
    converted = source.with_suffix(".out")
    done = rwkv("generate", "<board>\n", "-n", 3, "-m", converted)
    assert done.exit_code == 0, done.stderr
    done = rwkv("generate", "<board>\n2", "-m", converted)
    assert done.exit_code == 2
    assert "the prompt is beyond this model's vocabulary, which has no token for b'2'; leave that out" in done.stderr


@pytest.mark.parametrize("name", ["rwkv_vocab_v20240101.txt", "vocab.json"])
def test_a_vocabulary_beside_the_checkpoint_is_taken(rwkv: Run, source: Path, name: str) -> None:
    path = source.parent / name
    own = PUZZLE + "".join(f"{i} '{i}' {len(str(i))}\n" for i in range(6, 299))
    listed = AS_JSON | {str(i): str(i) for i in range(6, 299)}
    path.write_text(own if name.endswith("txt") else json.dumps(listed))
    assert load(rwkv, source).tokenizer.encode("<board>\n298") == [2, 298]
    assert load(rwkv, source.parent).tokenizer.encode("<board>\n298") == [2, 298]


def test_the_vocabulary_of_another_kind_of_model_is_left_alone(rwkv: Run, source: Path) -> None:
    """vocab.json of GPT-2 and others has the ids of tokens."""
    (source.parent / "vocab.json").write_text(json.dumps({"!": 0, "a": 1}))
    (source.parent / "rwkv_vocab_large.txt").write_text(PUZZLE + "400 'x' 1\n")
    assert rwkv("convert", source, source.with_suffix(".out")).stderr.startswith("Warning: no tokenizer fits")


@pytest.mark.parametrize(
    ("options", "settings", "first", "ends"),
    [
        ([], {}, "", None),
        (["--eos", 3], {}, "", [3]),
        (["--eos", 3], {"eos_token_id": 2}, "", [3]),
        ([], {"eos_token_id": 2}, "", [0, 2]),
        ([], {"eos_token_id": [2, 5, 0, 9999, "x"]}, "", [0, 2, 5]),
        ([], {"eos_token_id": None}, "", None),
        ([], {"eos_token_id": 0}, "", None),
        ([], {}, "zero", []),
        ([], {"eos_token_id": 5}, "zero", [5]),
    ],
)
def test_a_model_has_end_tokens_of_its_own(
    rwkv: Run, tmp_path: Path, source: Path, options: list[object], settings: Any, first: str, ends: Any
) -> None:
    path = tmp_path / "vocabulary"
    path.write_text(json.dumps(AS_JSON | ({"0": first} if first else {})))
    (source.parent / "config.json").write_text(json.dumps(settings))
    model = load(rwkv, source.parent, "--tokenizer", path, *options)
    checkpoint = Checkpoint(source.parent.with_suffix(".out"))
    assert checkpoint.metadata("ends", list, "no") == ("no" if ends is None else ends)
    assert model.ends == tuple([0] if ends is None else ends)


@pytest.mark.parametrize("eos", [-1, 300])
def test_an_end_token_is_in_the_vocabulary(rwkv: Run, source: Path, eos: int) -> None:
    refused(rwkv("convert", source, "--eos", eos), f"--eos {eos}: the model's vocabulary has ids from 0 to 299")


def test_a_text_ends_with_the_model_s_own_token(rwkv: Run, tmp_path: Path) -> None:
    source = tiny.write_pth(tmp_path / "a.pth", tiny.weights("7", vocab=256))
    model = load(rwkv, source)
    logits, _ = model.forward([65])
    best = int(np.argmax(logits))
    model = load(rwkv, source, "--eos", best)
    for ignored in (False, True):
        options = ["--ignore-eos"] if ignored else []
        done = rwkv("generate", "A", "-n", 2, "--temperature", 0, "--json", "-m", source.with_suffix(".out"), *options)
        assert (json.loads(done.stdout)["stop"] == "eos") != ignored


def test_world_with_tokens_of_its_own(rwkv: Run, tmp_path: Path, shared: Path) -> None:
    file = shared / "cases" / "world-vocab-beside" / "rwkv_vocab_v20230424.txt"
    if not file.is_file():
        pytest.skip("no such vocabulary; a small one beside a checkpoint is tested above")
    source = tiny.write_pth(tmp_path / "a.pth", tiny.weights("7", layers=1, width=16, vocab=65536, ffn=32))
    stock = load(rwkv, source).tokenizer.encode("<|ask|>Hello")
    (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = load(rwkv, source).tokenizer
    assert tokenizer.encode("<|ask|>Hello") == [65530, stock[-1]]
    assert tokenizer.decode([65530]) == "<|ask|>"
    assert len(stock) > 2
