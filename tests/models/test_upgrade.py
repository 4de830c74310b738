"""Files that outlive an upgrade: what version 0.1.0 wrote, and configs with other fields than today's."""

import json
import re
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from naive import error_ratio
from tiny import refused

import rwkv_cli
from rwkv_cli.kernels.cpu import backend
from rwkv_cli.models import Config, State
from rwkv_cli.quant.formats import Floats

OLD = Path(__file__).resolve().parents[1] / "old"
EXPECTED = json.loads((OLD / "v0.1.0.logits.json").read_text())
OPTIONAL = {f.name: f for f in fields(Config) if f.default is not MISSING or f.default_factory is not MISSING}
CONFIG = Config(
    "6", 2, 16, 256, 2, 8, 32, {"mix": 8, "decay": 12}, embedding_dtype="BF16", norm_eps=1e-4, group_norm_eps=1e-3
)


def old(version: str, kind: str) -> Path:
    return OLD / f"rwkv{version}-v0.1.0.{kind}.safetensors"


def check_logits(found: np.ndarray[Any, Any], expected: list[float], limit: float) -> None:
    wanted = np.array(expected)
    assert np.abs(found - wanted).max() <= limit * np.abs(wanted).max()
    assert error_ratio(found, wanted) < limit


@pytest.fixture(params=[True, False], ids=["all", "as now"])
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """How near logits must come to those of version 0.1.0, which had 15 bits for all activations.

    With as many bits, very near: what a file's matrices by columns stand for is multiplied in float then. With the 8
    bits of now, these matrices move logits by some thousandths.
    """
    if not request.param:
        return 1e-2
    weight = backend.weight

    def finer(stored: Any) -> Any:
        if stored.format == "float" or not stored.layout.startswith("columns"):
            return weight(stored)
        return weight(Floats("float", "F32", stored.float32()))

    monkeypatch.setattr(backend, "weight", finer)
    return 5e-5


@pytest.mark.parametrize("version", EXPECTED)
def test_a_model_of_an_older_version_gives_its_logits(version: str, limit: float) -> None:
    wanted = EXPECTED[version]
    model = rwkv_cli.load(old(version, "int8"))
    logits, state = model.forward(wanted["ids"])
    check_logits(logits, wanted["logits"], limit)
    check_logits(model.forward(wanted["more"], state)[0], wanted["logits_after_more"], limit)


@pytest.mark.parametrize("version", EXPECTED)
def test_a_state_of_an_older_version_goes_on(version: str, limit: float) -> None:
    model = rwkv_cli.load(old(version, "int8"))
    state = State.load(old(version, "state"), model.new_state())
    check_logits(model.forward(EXPECTED[version]["more"], state)[0], EXPECTED[version]["logits_after_more"], limit)


def test_a_field_of_the_config_that_comes_later_has_a_default() -> None:
    always = {"version", "layers", "width", "vocab", "heads", "head_size", "ffn"}
    assert {f.name for f in fields(Config)} - set(OPTIONAL) == always


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_field_that_a_file_lacks_has_its_default(name: str) -> None:
    stored = CONFIG.as_json()
    assert Config.from_json(stored) == CONFIG
    stored.pop(name, None)
    made: Any = OPTIONAL[name].default_factory
    default = OPTIONAL[name].default if made is MISSING else made()
    assert Config.from_json(stored) == replace(CONFIG, **{name: default})


@pytest.mark.parametrize("name", [f.name for f in fields(Config) if f.name not in OPTIONAL])
def test_a_missing_field_without_a_default_is_named(name: str) -> None:
    stored = CONFIG.as_json()
    del stored[name]
    with pytest.raises(ValueError, match=f"^the field '{name}' is missing$"):
        Config.from_json(stored)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"taps": 3}, "its config has a field 'taps' of a newer version; upgrade rwkv-cli"),
        ({"vocab": None}, "its config is damaged (the field 'vocab' is missing); convert the model again"),
    ],
)
def test_a_config_of_another_version_is_refused_by_field(
    rwkv: Callable[..., Result], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    data = old("7", "int8").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    config = json.loads(header["__metadata__"]["config"]) | change
    config = {name: value for name, value in config.items() if value is not None}
    header["__metadata__"]["config"] = json.dumps(config)
    text = json.dumps(header).encode()
    path = tmp_path / "a"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    refused(rwkv("generate", "hi", "-m", path), f"{path}: {re.escape(says)}")


@pytest.mark.parametrize("quant", ["int8", "none"])
def test_no_file_names_a_part_of_this_program(converted: Callable[..., Path], tmp_path: Path, quant: str) -> None:
    """A module that moves would make the files of its old place useless."""
    model = rwkv_cli.load(converted("7", quant, vocab=256))
    model.forward([1, 2])[1].save(tmp_path / "state")
    for path in (model.path, tmp_path / "state"):
        assert not re.search(rb"rwkv_cli|kernels|quant\.|models\.", path.read_bytes())
