"""rwkv tokenize: ids and pieces of a text, for every kind of tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import tokenizers
from click.testing import Result

import rwkv_cli

Run = Callable[..., Result]
TEXT = "Once upon\n a time, é 🙂"


@pytest.fixture
def json_model(rwkv: Run, tmp_path: Path) -> Path:
    """A model with a byte-level BPE that knows one merge."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tiny.write_pth(tmp_path / "a.pth", tiny.weights("7", layers=1, vocab=300))
    assert rwkv("convert", tmp_path / "a.pth", tmp_path / "a.out").exit_code == 0
    return tmp_path / "a.out"


@pytest.fixture
def world_model(converted: Callable[..., Path]) -> Path:
    return converted("7", vocab=65536, width=16, layers=1, ffn=32)


@pytest.mark.parametrize("kind", ["byte_model", "json_model", "world_model"])
def test_the_pieces_make_up_the_text(rwkv: Run, kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    facts = json.loads(rwkv("tokenize", TEXT, "-m", model, "--json").stdout)
    assert facts == json.loads(rwkv("tokenize", "-m", model, "--json", input=TEXT + "\n").stdout)
    tokenizer = rwkv_cli.load(model).tokenizer
    assert tokenizer is not None
    assert facts["ids"] == tokenizer.encode(TEXT)
    assert (facts["count"], len(facts["pieces"])) == (len(facts["ids"]), len(facts["ids"]))
    assert "".join(facts["pieces"]).startswith("Once upon\n a time, ")
    table = rwkv("tokenize", TEXT, "-m", model)
    lines = table.stdout.splitlines()
    assert [int(line.split()[0]) for line in lines] == facts["ids"]
    assert [json.loads(line.split(maxsplit=1)[1]) for line in lines] == facts["pieces"]
    assert f"{facts['count']} tokens, {len(TEXT.encode())} bytes" in table.stderr


@pytest.mark.parametrize("kind", ["byte_model", "json_model", "world_model"])
def test_a_long_text_is_split_as_a_short_one(
    rwkv: Run, request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long text is split a part at a time, and the parts are not in the result."""
    monkeypatch.setattr("rwkv_cli.commands.tokenize._BLOCK", 7)
    model = request.getfixturevalue(kind)
    text = TEXT * 50
    facts = json.loads(rwkv("tokenize", text, "-m", model, "--json").stdout)
    tokenizer = rwkv_cli.load(model).tokenizer
    assert tokenizer is not None
    assert facts["ids"] == tokenizer.encode(text)
    lines = rwkv("tokenize", text, "-m", model).stdout.splitlines()
    assert [int(line.split()[0]) for line in lines] == facts["ids"]
    assert [json.loads(line.split(maxsplit=1)[1]) for line in lines] == facts["pieces"]


def test_a_known_text(rwkv: Run, world_model: Path) -> None:
    result = rwkv("tokenize", "User: hi\n\nAssistant:", "-m", world_model)
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "24281",
        "59",
        "4571",
        "261",
        "5585",
        "41693",
        "59",
    ]


def test_bytes_that_are_no_text(rwkv: Run, byte_model: Path, json_model: Path) -> None:
    facts = json.loads(rwkv("tokenize", "-m", byte_model, "--json", input=b"a\xff").stdout)
    assert facts == {"ids": [97, 255], "pieces": ["a", "\\xff"], "count": 2}
    result = rwkv("tokenize", "-m", json_model, input=b"a\xff")
    assert (result.exit_code, "the text is not UTF-8 at byte 1" in result.stderr) == (2, True)
    assert rwkv("tokenize", "-m", byte_model, "a").stderr == "1 token, 1 byte\n"
    assert rwkv("tokenize", "-m", byte_model, input=b"").stderr.endswith("0 tokens, 0 bytes\n")


def test_a_model_without_a_tokenizer(rwkv: Run, converted: Callable[..., Path]) -> None:
    result = rwkv("tokenize", "a", "-m", converted("7", vocab=300))
    assert (result.exit_code, "has no tokenizer" in result.stderr) == (1, True)
