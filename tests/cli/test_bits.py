"""rwkv convert --bits: formats by what rounding changes, no more bits than asked for, and the same file every time."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import Result

from rwkv_cli.engine import conversion
from rwkv_cli.engine.mixture import Option, choose

Run = Callable[..., Result]
ORDER = ["q4", "q5", "q6", "int8"]


def weights() -> tiny.Tensors:
    return tiny.weights("7", vocab=256, layers=1, width=128, head=32, ffn=128)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrate on few tokens, which is as much work as a test needs."""
    monkeypatch.setattr(conversion, "TOKENS", 640)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write_pth(tmp_path / "rwkv7-g1.pth", weights())


def test_the_number_of_bits_is_met_and_the_file_the_same(rwkv: Run, tmp_path: Path, source: Path) -> None:
    result = rwkv("convert", source, "--bits", "7")
    assert result.exit_code == 0, result.output
    path = tmp_path / "rwkv7-g1.7.0bits.safetensors"
    facts = json.loads(rwkv("info", path, "--json").stdout)
    assert facts["quantization"] == "7.0bits"
    assert 6.8 < facts["bits_per_weight"] <= 7
    formats = {kind: each["format"] for kind, each in facts["formats"].items()}
    assert {"emb", "head", "att.key", "ffn.value", "low rank"} <= formats.keys()
    assert len(set(formats.values())) > 1
    assert set(formats.values()) <= set(ORDER)
    told = rwkv("info", path).stdout
    for kind, format in formats.items():
        assert re.search(rf"^{kind} +{format} +\d+\.\d\d$", told, re.MULTILINE)
        shown = "att.w1" if kind == "low rank" else kind
        assert re.search(rf"^{shown} +{format} ", result.stdout, re.MULTILINE)
    assert rwkv("generate", "a", "-m", path, "-n", "3").exit_code == 0
    rwkv("convert", source, tmp_path / "again", "--bits", "7.0")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize(
    ("kind", "others"),
    [("att.output", ["ffn.key", "ffn.value"]), ("ffn.value", ["att.receptance", "att.value", "att.output"])],
)
def test_what_matters_more_gets_more_bits(
    rwkv: Run, tmp_path: Path, source: Path, kind: str, others: list[str]
) -> None:
    """A matrix whose outputs drown those of the others has a finer format."""
    tensors = weights()
    tensors[f"blocks.0.{kind}.weight"] = tensors[f"blocks.0.{kind}.weight"] * 50
    tiny.write_pth(source, tensors)
    assert rwkv("convert", source, tmp_path / "m", "--bits", "6").exit_code == 0
    found = json.loads(rwkv("info", tmp_path / "m", "--json").stdout)
    assert found["bits_per_weight"] <= 6
    formats = {name: ORDER.index(each["format"]) for name, each in found["formats"].items()}
    assert all(formats[kind] > formats[other] for other in others), formats


def test_a_dry_run_tells_what_is_possible(rwkv: Run, tmp_path: Path, source: Path) -> None:
    result = rwkv("convert", source, "--bits", "6", "--dry-run")
    found = re.search(r"bits per weight +6 at most, of ([0-9.]+) to ([0-9.]+) that are possible\n", result.stdout)
    assert found
    low, high = map(float, found.groups())
    for bits in (low - 0.1, high + 0.1, -1, "nan", "inf"):
        says = r"--bits [0-9a-z.-]+: .* take [0-9.]+ to [0-9.]+; give one of these"
        tiny.refused(rwkv("convert", source, tmp_path / "m", "--bits", bits), says)
    tiny.refused(rwkv("convert", source, "--bits", "6", "--calibrate", "none"), "leave one of them out")
    assert "leave one of them out" in rwkv("convert", source, "--bits", "6", "--quant", "q4").stderr
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_the_choice_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        options = {
            kind: [Option(f, int(size) * (4 + n), float(kl) * 4.0**-n) for n, f in enumerate(ORDER)]
            for kind, size, kl in zip("abcde", rng.integers(1, 50, 5), rng.exponential(size=5), strict=True)
        }
        least, most = (sum(each[n].bytes for each in options.values()) for n in (0, -1))
        room = int(rng.integers(least, most + 1))
        every = itertools.product(*options.values())
        best = min(sum(o.kl for o in each) for each in every if sum(o.bytes for o in each) <= room)
        chosen = choose(options, room)
        mine = [next(o for o in options[kind] if o.format == f) for kind, f in chosen.items()]
        assert sum(o.bytes for o in mine) <= room
        assert sum(o.kl for o in mine) == pytest.approx(best)
