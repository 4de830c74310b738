"""Vocabularies and tokenizers from files: what is broken is refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from rwkv_cli.engine.json_tokenizer import JsonTokenizer
from rwkv_cli.engine.tokenizer import WorldTokenizer, official_vocabulary
from rwkv_cli.errors import FormatError, TokenizerError

SINGLES = "".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "without tokens"),
        (SINGLES[20:].encode(), "line"),
        (SINGLES.encode() + b"257 'ab' 3\n", "disagree"),
        (SINGLES.encode() + b"257 '' 0\n", "disagree"),
        (SINGLES.encode() + b"257 5 1\n", "disagree"),
        (SINGLES.encode() + b"256 'ab' 2\n", "twice"),
        (SINGLES.encode() + b"0 'ab' 2\n", "out of range"),
        (SINGLES.encode() + b"99999999999 'ab' 2\n", "out of range"),
        (b"hello\n", "line 'hello'"),
        (b"1 __import__('os') 2\n", "line"),
        (b"1 {[]} 2\n", "line"),
        (b"1 '\\ud800' 3\n", "line"),
        (b"1 " + b"-" * 100_000 + b"1 3\n", "line"),
        (b"\xff\xfe", "World vocabulary"),
    ],
)
def test_a_broken_vocabulary_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "v.txt").write_bytes(text)
    with pytest.raises(TokenizerError, match=message) as error:
        WorldTokenizer.from_vocabulary(tmp_path / "v.txt")
    assert str(tmp_path / "v.txt") in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("data", "lengths"),
    [
        (np.zeros(3, np.uint8), np.array([1, 1], np.uint8)),
        (np.zeros(0, np.uint8), np.array([], np.uint8)),
        (np.zeros(0, np.uint8), np.array([0, 0], np.uint8)),
        (np.zeros((), np.uint8), np.array(2, np.uint8)),
        (np.zeros(2, np.float32), np.array([1, 1], np.uint8)),
        (np.zeros(2, np.uint8), np.array([1, 1], np.int8)),
    ],
)
def test_damaged_arrays_are_refused(data: Any, lengths: Any) -> None:
    with pytest.raises(TokenizerError, match=r"do not add up|without tokens"):
        WorldTokenizer.from_arrays(data, lengths)


def test_a_missing_world_vocabulary_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(TokenizerError, match="pip install rwkv"):
        official_vocabulary()


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff", b'{"model": {"type": "none"}}'])
def test_a_broken_tokenizer_json_is_refused(text: bytes) -> None:
    with pytest.raises(TokenizerError, match=r"^there: not a tokenizer.json"):
        JsonTokenizer(text, "there")


@pytest.mark.parametrize(
    "made",
    [
        tokenizers.models.WordLevel(vocab={"a": 0}, unk_token="[UNK]"),
        tokenizers.models.WordPiece(vocab={"a": 0}, unk_token="[UNK]"),
        tokenizers.models.BPE(vocab={"a": 0}, merges=[], unk_token="[UNK]"),
    ],
)
def test_a_tokenizer_that_cannot_encode_is_named(made: Any, rwkv: Any, converted: Any, tmp_path: Path) -> None:
    text = tokenizers.Tokenizer(made).to_str().encode()
    tokenizer = JsonTokenizer(text, "tokenizer.json", "model.safetensors")
    says = r"^model\.safetensors: its tokenizer cannot encode \(.*\); convert the model with a sound one"
    with pytest.raises(FormatError, match=says):
        tokenizer.encode("b")
    with pytest.raises(FormatError, match=says):
        list(tokenizer.encode_blocks([b"b"]))
    (tmp_path / "bad.json").write_bytes(text)
    result = rwkv("convert", converted().with_suffix(".pth"), tmp_path / "out", "--tokenizer", tmp_path / "bad.json")
    assert result.exit_code == 1
    assert f"Error: {tmp_path / 'bad.json'}: its tokenizer cannot encode" in result.stderr
    assert not (tmp_path / "out").exists()


def with_parts(**parts: Any) -> bytes:
    """A tokenizer.json of two words with parts that the library itself would not write."""
    made = json.loads(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "": 1}, unk_token="a")).to_str())
    return json.dumps(made | parts).encode()


BROKEN = {
    "a map that cannot be read": (
        with_parts(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////wAA"}),
        "not a",
    ),
    "a map that points beyond itself": (
        with_parts(normalizer={"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}),
        "its tokenizer cannot encode",
    ),
    "a decoder that cuts what is not there": (
        with_parts(decoder={"type": "Strip", "content": " ", "start": 9, "stop": 9}),
        "its tokenizer cannot decode",
    ),
    "Unigram without an unknown token": (
        with_parts(model={"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}),
        "its tokenizer cannot encode",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_tokenizer_that_panics_is_refused_in_one_sentence(
    kind: str, rwkv: Any, converted: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The library is written in Rust. Where it panics, it also writes to standard error, past Python."""
    text, says = BROKEN[kind]
    (tmp_path / "bad.json").write_bytes(text)
    source = converted().with_suffix(".pth")
    capfd.readouterr()
    result = rwkv("convert", source, tmp_path / "out", "--tokenizer", tmp_path / "bad.json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{tmp_path / 'bad.json'}: {says}" in result.stderr
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "out").exists()
