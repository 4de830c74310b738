"""rwkv convert --calibrate: the same file every time, what it cost is said and kept, and nothing is left behind."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import Result

import rwkv_cli
from rwkv_cli.engine import calibration, conversion
from rwkv_cli.engine.bars import no_bars
from rwkv_cli.quant import Checkpoint, open_source

Run = Callable[..., Result]
WEIGHTS = tiny.weights("7", vocab=256, layers=2, width=32, head=16, ffn=64)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write_pth(tmp_path / "rwkv7-g1.pth", WEIGHTS)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrate on few tokens, which is as much work as a test needs."""
    monkeypatch.setattr(conversion, "TOKENS", 640)


@pytest.mark.usefixtures("few")
def test_it_says_what_it_cost_and_does_it_again(rwkv: Run, tmp_path: Path, source: Path) -> None:
    result = rwkv("convert", source, tmp_path / "a", "--calibrate", "self")
    assert result.exit_code == 0, result.output
    assert re.search(r"calibrated on +384 tokens of a text of the model's own\n", result.stdout)
    shown = re.search(r"KL to the source +([0-9.e-]+) on 256 more tokens of it\n", result.stdout)
    assert shown
    assert 0 < float(shown[1]) < 1e-3
    assert re.search(r"same likeliest token +[0-9.]+%\n", result.stdout)
    assert all(re.search(rf"{kind} .*%.*%.*%\n", result.stdout) for kind in ("emb", "head", r"ffn\.value", r"att\.w1"))
    rwkv("convert", source, tmp_path / "b", "--calibrate", "self")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    facts = json.loads(rwkv("info", tmp_path / "a", "--json").stdout)["calibration"]
    assert facts == {"text": "self", "tokens": 640, "held_out": 256, "kl": pytest.approx(float(shown[1]), rel=0.01),
                     "top1": facts["top1"]}  # fmt: skip
    told = rwkv("info", tmp_path / "a").stdout
    assert re.search(r"KL to the source +[0-9.e-]+, on the end of 640 tokens: self\n", told)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("version", "quant"),
    [("4", "int8"), ("5.0", "q6"), ("5.2", "int8"), ("6", "q4"), ("7", "q5"), ("7a", "int8"), ("8-rc00", "int8")],
)
def test_every_version_calibrates(rwkv: Run, tmp_path: Path, version: str, quant: str) -> None:
    """The outputs of matrices are nearer to the source's than their own numbers are."""
    weights = tiny.weights(version, vocab=256, layers=2, width=32, head=16, ffn=64)
    source = tiny.write_pth(tmp_path / "m.pth", weights, "F32")
    result = rwkv(
        "convert", source, tmp_path / "m", "--quant", quant, *(["--calibrate", "self"] if quant == "int8" else [])
    )
    assert result.exit_code == 0, result.output
    model = Checkpoint(tmp_path / "m")
    matrices = [name for name in model.names() if model.layout(name)["layout"].startswith(("tile", "columns"))]
    assert len(matrices) > 10
    facts = [model.layout(name) for name in matrices]
    assert sum(fact["effect"] for fact in facts) < sum(fact["error"] for fact in facts)
    assert model.metadata("calibration", dict)["kl"] < 0.1


@pytest.mark.usefixtures("few")
def test_a_text_of_the_users(rwkv: Run, tmp_path: Path, source: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Es war einmal ein König, der hatte drei Töchter. " * 20)
    result = rwkv("convert", source, tmp_path / "a", "--calibrate", text)
    assert result.exit_code == 0, result.output
    assert "calibrated on         384 tokens of text\n" in result.stdout
    assert Checkpoint(tmp_path / "a").metadata("calibration", dict)["text"] == "text"
    for content, says in (
        ("too short", "text: has only 9 tokens; to calibrate takes 512 or more"),
        ("", "text: has only 0 tokens"),
    ):
        text.write_text(content)
        tiny.refused(rwkv("convert", source, tmp_path / "b", "--calibrate", text), says)
    for more in ([], ["--dry-run"]):  # before anything is compiled or written
        result = rwkv("convert", source, tmp_path / "b", "--calibrate", tmp_path / "none", *more)
        tiny.refused(result, "none: No such file")
    tiny.refused(rwkv("convert", source, tmp_path / "b", "--calibrate", "self", "--quant", "none"), "nothing to round")
    odd = tiny.write_pth(tmp_path / "odd.pth", tiny.weights("7", vocab=99, layers=1, width=32, head=16, ffn=64))
    assert rwkv("convert", odd, tmp_path / "b", "--calibrate", text).exit_code == 1
    assert not (tmp_path / "b").exists()
    assert rwkv("convert", odd, tmp_path / "b", "--calibrate", "self").exit_code == 0


def spoilt_by_rounding() -> tiny.Tensors:
    """A model whose ln0 makes small channels of the embedding large, as much as its float results need."""
    weights = dict(tiny.weights("7", vocab=256, layers=2, width=64, head=16, ffn=64))
    large = np.arange(64) % 8 == 0
    factor = np.where(large, 1, 1e-3).astype(np.float32)
    emb = weights["emb.weight"] * factor
    emb[:, large] -= emb.sum(axis=1, keepdims=True) / large.sum()  # else small channels would tell the mean alone
    weights["emb.weight"] = emb
    weights["blocks.0.ln0.weight"] = weights["blocks.0.ln0.weight"] / factor
    return weights


def test_an_embedding_that_rounding_would_spoil_is_kept(rwkv: Run, tmp_path: Path) -> None:
    source = tiny.write_pth(tmp_path / "m.pth", spoilt_by_rounding())
    result = rwkv("convert", source, tmp_path / "m")
    assert re.search(r"The embedding was kept as it is: rounded, it would be off by 0\.\d%, but by \d\d", result.stderr)
    model = Checkpoint(tmp_path / "m")
    assert model.layout("emb.weight")["layout"] == "float"
    np.testing.assert_array_equal(
        model.tensor("emb.weight", (256, 64)).float32(), open_source(source)["emb.weight"].float32()
    )
    assert model.layout("head.weight")["layout"] == "tile"
    assert rwkv("generate", "a", "-m", tmp_path / "m", "-n", "3").exit_code == 0


def test_a_usual_embedding_is_rounded_and_its_effect_shown(rwkv: Run, tmp_path: Path, source: Path) -> None:
    result = rwkv("convert", source, tmp_path / "m")
    assert re.search(r"\nemb .* 0\.\d+% +0\.\d+% +0\.\d+%\n", result.stdout)
    assert 0.003 < Checkpoint(tmp_path / "m").layout("emb.weight")["effect"] < 0.01
    assert "kept" not in result.stderr


def large_columns(folder: Path, times: int) -> tuple[Path, Path]:
    """Two models that are the same in float. One has columns that are so many times as large, and their inputs less."""
    weights = {name: array.copy() for name, array in tiny.weights("7", vocab=256, layers=2, width=64, ffn=64).items()}
    usual = tiny.write_pth(folder / "usual.pth", weights, "F32")
    for part in ("weight", "bias"):
        weights[f"blocks.1.ln2.{part}"][::32] /= times
    weights["blocks.1.ffn.key.weight"][:, ::32] *= times
    return usual, tiny.write_pth(folder / "m.pth", weights, "F32")


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("options", "times", "kept"),
    [
        (["--quant", "int8", "--calibrate", "self"], 1024, "float"),
        (["--quant", "q4"], 1024, "float"),
        (["--quant", "q4"], 16, "int8"),
        (["--bits", "8"], 16, "int8"),
    ],
)
def test_a_matrix_that_rounding_would_spoil_is_kept(
    rwkv: Run, tmp_path: Path, options: list[str], times: int, kept: str
) -> None:
    """A model with large columns then costs what the same model costs whose columns are alike."""
    usual, source = large_columns(tmp_path, times)
    told = rwkv("convert", usual, tmp_path / "usual", *options)
    assert not re.search("kept|off by", told.stderr)
    assert json.loads(rwkv("info", tmp_path / "usual", "--json").stdout)["kept"] == []
    told = rwkv("convert", source, tmp_path / "m", *options)
    assert told.exit_code == 0, told.output
    place = "int8" if kept == "int8" else "the source's dtype"
    says = rf"blocks\.1\.ffn\.key\.weight was kept in {place}: in \w+, what it computes would be off by \d+\.\d%, and"
    assert re.search(says, " ".join(told.stderr.split()))
    assert "Warning" not in told.stderr
    assert re.search(rf"^ffn\.key +{kept} ", told.stdout, re.MULTILINE)
    facts = json.loads(rwkv("info", tmp_path / "m", "--json").stdout)
    assert facts["kept"] == ["blocks.1.ffn.key.weight"]
    assert kept in facts["formats"]["ffn.key"]["format"].split(", ")
    assert "--bits" not in options or facts["bits_per_weight"] <= 8
    told = rwkv("info", tmp_path / "m")
    assert re.search(r"^kept in more bits +blocks\.1\.ffn\.key\.weight$", told.stdout, re.MULTILINE)
    model, other = Checkpoint(tmp_path / "m"), Checkpoint(tmp_path / "usual")
    assert (model.layout("blocks.1.ffn.key.weight")["layout"] == "float") == (kept == "float")
    kl, usually = (each.metadata("calibration", dict)["kl"] for each in (model, other))
    assert kl < (1.5 if "--bits" in options else 1.2) * usually  # kept bits are missing elsewhere in a mixture


@pytest.mark.parametrize("quant", ["int8", "q6", "q4"])
def test_no_matrix_of_a_trained_model_is_kept(quant: str) -> None:
    found = conversion.Conversion.of(Path(rwkv_cli.__file__).parent / "storyteller.pth", quant)
    assert found.tokenizer is not None
    ids = np.array(found.tokenizer.encode("Once upon a time there was a little girl who had a red ball. " * 6))
    assert conversion.judge(found.contents.plan, found.source_model, ids, no_bars) == []


@pytest.mark.usefixtures("few")
def test_a_matrix_that_is_spoilt_without_notice_is_named(
    rwkv: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text that calibrates is longer than what is judged before."""
    _, source = large_columns(tmp_path, 1024)
    monkeypatch.setattr(conversion, "judge", lambda *_: [])
    told = rwkv("convert", source, tmp_path / "m", "--quant", "q4")
    says = r"Warning: what blocks\.1\.ffn\.key\.weight computes is off by [0-9.]+%, and q4 usually costs"
    assert re.search(says, " ".join(told.stderr.split()))


@pytest.mark.usefixtures("few")
def test_a_great_loss_is_a_warning(rwkv: Run, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calibration.USUAL_KL, "int8", 1e-12)
    result = rwkv("convert", source, tmp_path / "m", "--calibrate", "self")
    assert re.search(r"Warning: a KL of [0-9.e-]+ is far more than int8 usually costs", result.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_calibration_leaves_nothing(tmp_path: Path, source: Path, number: signal.Signals) -> None:
    """The signal comes while the whole file is measured, just before it would appear."""
    folder, mark = tmp_path / "models", tmp_path / "mark"
    folder.mkdir()
    code = (
        "import time, pathlib; from rwkv_cli.engine import calibration, conversion; conversion.TOKENS = 512;"
        f"calibration.loss = lambda *_: (pathlib.Path({str(mark)!r}).touch(), time.sleep(60));"
        "from rwkv_cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "convert", source, folder / "m", "--calibrate", "self"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not mark.exists():
                assert process.poll() is None
                time.sleep(0.02)
            assert [path.suffix for path in folder.iterdir()] == [".part"]
            process.send_signal(number)
            assert process.wait(30) == (1 if number == signal.SIGINT else 128 + number)
        finally:
            process.kill()
    assert list(folder.iterdir()) == []
