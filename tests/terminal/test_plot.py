"""--plot of rwkv ppl and rwkv info: what is drawn, what is refused, and that nothing is left behind."""

import json
import math
import os
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import Result
from extras import needs

import rwkv_cli
from rwkv_cli.engine.scoring import Scorer
from rwkv_cli.models import registry
from rwkv_cli.quant import Checkpoint
from rwkv_cli.terminal.plot import plot_errors

Run = Callable[..., Result]
Patch = pytest.MonkeyPatch
TEXT = b"It was a dark and stormy night; the rain fell in torrents.\n" * 5


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "night.txt").write_bytes(TEXT)
    return tmp_path / "night.txt"


@pytest.fixture
def figures(monkeypatch: Patch) -> list[Any]:
    """The figures that are saved."""
    figure = needs("matplotlib.figure", "dev").Figure
    saved, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **b: (saved.append(self), save(self, *a, **b)))
    return saved


def words(svg: Path) -> list[str]:
    """The texts of an SVG."""
    return ["".join(element.itertext()) for element in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


def drawn(result: Result, path: Path) -> None:
    assert result.exit_code == 0, result.output
    assert result.stderr.endswith(f"Wrote {path}\n")


@pytest.mark.parametrize("options", [(), ("--context", 64), ("--context", 64, "--start-token", "none")])
def test_a_line_is_the_bins(
    rwkv: Run, byte_model: Path, text: Path, tmp_path: Path, figures: list[Any], options: tuple[object, ...]
) -> None:
    out = tmp_path / "a.svg"
    result = rwkv("ppl", text, "-m", byte_model, "--json", "--plot", out, *options)
    drawn(result, out)
    facts = json.loads(result.stdout)
    bins, (axes,) = np.array(facts["by_position"], float), figures[0].axes
    (line,), (band,) = axes.lines, axes.collections
    np.testing.assert_allclose(line.get_xdata(), np.sqrt(bins[:, 0] * bins[:, 1]))
    np.testing.assert_allclose(line.get_ydata(), bins[:, 3])
    x, y = np.concatenate([path.vertices for path in band.get_paths()]).T
    for at, mean, error in zip(line.get_xdata(), bins[:, 3], bins[:, 4], strict=True):
        if not math.isnan(error):  # a single token has none
            assert np.isclose(x, at).any()
            assert (y[np.isclose(x, at)].min(), y[np.isclose(x, at)].max()) == pytest.approx(
                (mean - error, mean + error)
            )
    assert axes.get_xscale() == "log"
    said = words(out)
    context = "context 64" if options else "whole text"
    name = byte_model.name
    assert f"night.txt · {name} · {facts['tokens']} tokens · {context} · perplexity {facts['ppl']:.4g}" in said
    assert {"NLL by position in the context", "token position since the context began"} <= set(said)
    assert "NLL in nats per token, ± standard error" in said
    assert {"1" if "none" not in options else "2", "4", "16"} <= set(said)
    assert not figures[0].legends
    assert "matplotlib.pyplot" not in sys.modules


def test_a_line_for_each_text_and_model(
    rwkv: Run, converted: Any, text: Path, tmp_path: Path, figures: list[Any]
) -> None:
    a, b = converted("7", vocab=256), converted("7", vocab=256, seed=1)
    other = tmp_path / "_a$b$ x^{ 你好.txt"
    other.write_bytes(TEXT[::-1])
    out = tmp_path / "a.svg"
    result = rwkv("ppl", text, other, "-m", a, "--compare", b, "--json", "--context", 50, "--limit", 120, "--plot", out)
    drawn(result, out)
    facts = list(map(json.loads, result.stdout.splitlines()))
    lines = figures[0].axes[0].lines
    want = [row[key] for row in facts for key in ("by_position", "other_by_position")]
    for line, bins in zip(lines, want, strict=True):
        np.testing.assert_allclose(line.get_ydata(), [row[3] for row in bins])
    assert want[0] != want[1]
    look = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert len(set(look)) == 4
    assert (look[0][0], look[0][1]) == (look[1][0], look[2][1])
    legend = [
        f"{row['file'].split('/')[-1]} · {path.name} · perplexity {ppl:.4g}"
        for row in facts
        for path, ppl in ((a, row["ppl"]), (b, row["other_ppl"]))
    ]
    said = words(out)
    assert [text for text in said if "perplexity" in text] == legend
    assert "120 tokens · context 50" in said


def test_names_tell_lines_apart(rwkv: Run, byte_model: Path, tmp_path: Path, figures: list[Any]) -> None:
    """Names may be the same in two folders, long, of no Unicode, or hold an escape sequence."""
    paths = [tmp_path / "b" / "n", tmp_path / "c" / "n", tmp_path / ("x" * 200), tmp_path / "e\x1b[2J\n",
             tmp_path / os.fsdecode(b"f\xff")]  # fmt: skip
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(TEXT)
    out = tmp_path / "a.svg"
    drawn(rwkv("ppl", *paths, "-m", byte_model, "--limit", 9, "--json", "--plot", out), out)
    assert words(out)
    said = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert [text[-1] for text in said] == ["n", "n", "x", "J", "�"]
    assert said[3].endswith("/e�[2J")
    assert len(set(said)) == 5
    assert all(len(text) <= 48 for text in said)


def test_long_names_leave_room_for_the_picture(rwkv: Run, byte_model: Path, tmp_path: Path, figures: list[Any]) -> None:
    text, model = tmp_path / ("x" * 250), tmp_path / ("y z" * 80)
    text.write_bytes(TEXT)
    model.write_bytes(byte_model.read_bytes())
    for command in (("info", model), ("ppl", text, "-m", model, "--limit", 9)):
        drawn(rwkv(*command, "--plot", tmp_path / "a.png"), tmp_path / "a.png")
        box = figures[-1].axes[0].get_position()
        assert box.width > 0.7
        assert box.height > 0.5
        figures[-1].set_dpi(200)  # as it was drawn
        for said in figures[-1].axes[0].texts:
            assert said.get_window_extent().x1 <= figures[-1].bbox.x1


@pytest.mark.parametrize(
    ("name", "begins"), [("a.png", b"\x89PNG"), ("a.PNG", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")]
)
def test_the_name_says_the_format(
    rwkv: Run, byte_model: Path, text: Path, tmp_path: Path, name: str, begins: bytes
) -> None:
    needs("matplotlib", "dev")
    (tmp_path / name).write_text("an older picture")
    for command in (("info", byte_model), ("ppl", text, "-m", byte_model, "--limit", 5)):
        drawn(rwkv(*command, "--plot", tmp_path / name), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begins)
    assert {path.name for path in tmp_path.iterdir()} == {name, text.name}


@pytest.mark.parametrize("command", ["ppl", "info"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a.jpg", "a.jpg does not end in .png, .svg or .pdf"),
        ("png", "png does not end in .png, .svg or .pdf"),
        ("no/a.png", "no is not a folder; make it first, or name another file"),
        ("night.txt/a.png", "night.txt is not a folder; make it first"),
        ("folder.svg", "folder.svg' is a directory"),
    ],
)
def test_a_picture_that_cannot_be_is_refused_before_any_work(
    rwkv: Run, byte_model: Path, text: Path, tmp_path: Path, monkeypatch: Patch, command: str, name: str, says: str
) -> None:
    needs("matplotlib", "dev")
    (tmp_path / "folder.svg").mkdir()
    monkeypatch.setattr(Scorer, "score", None)
    model = (text, "-m", byte_model) if command == "ppl" else (byte_model,)
    result = rwkv(command, *model, "--plot", tmp_path / name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"folder.svg", "night.txt"}


@pytest.mark.parametrize("command", ["ppl", "info"])
def test_matplotlib_is_wanted_only_for_a_picture(
    rwkv: Run, byte_model: Path, text: Path, tmp_path: Path, monkeypatch: Patch, command: str
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = (command, text, "-m", byte_model) if command == "ppl" else (command, byte_model)
    assert rwkv(*arguments).exit_code == 0
    monkeypatch.setattr(Scorer, "score", None)
    result = rwkv(*arguments, "--plot", tmp_path / "a.png")
    tiny.refused(result, re.escape('--plot needs matplotlib; install it with: pip install "rwkv-cli[plot]"'))
    assert list(tmp_path.iterdir()) == [text]


def test_a_text_is_not_overwritten_by_its_picture(rwkv: Run, byte_model: Path, tmp_path: Path) -> None:
    needs("matplotlib", "dev")
    (tmp_path / "a.svg").write_bytes(TEXT)
    result = rwkv("ppl", tmp_path / "a.svg", "-m", byte_model, "--plot", tmp_path / "." / "a.svg")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "a.svg is one of the texts; name another file" in result.stderr
    assert (tmp_path / "a.svg").read_bytes() == TEXT


@pytest.mark.parametrize("what", ["a broken text", "an interruption", "a broken drawing", "a full disk"])
def test_a_run_that_fails_leaves_the_folder_as_it_was(
    rwkv: Run, byte_model: Path, text: Path, tmp_path: Path, monkeypatch: Patch, what: str
) -> None:
    figure = needs("matplotlib.figure", "dev").Figure
    out = tmp_path / "a.png"
    out.write_text("an older picture")
    texts = [text]

    def fail(error: BaseException) -> Any:
        def raising(*_: Any, **__: Any) -> Any:
            raise error

        return raising

    if what == "a broken text":
        texts.append(tmp_path / "empty")
        texts[-1].touch()
    elif what == "an interruption":
        monkeypatch.setattr(Scorer, "_add", fail(KeyboardInterrupt()))
    elif what == "a broken drawing":
        monkeypatch.setattr(figure, "savefig", fail(MemoryError()))
    else:
        monkeypatch.setattr(os, "fsync", fail(OSError(28, os.strerror(28))))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = rwkv("ppl", *texts, "-m", byte_model, "--plot", out)
    assert result.exit_code == 1
    assert "Wrote" not in result.stderr
    assert "Traceback" not in result.output
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_the_file_says_what_quantizing_cost(rwkv: Run, converted: Any, version: str) -> None:
    weights, path = tiny.weights(version), converted(version)
    shapes = {name: array.shape for name, array in weights.items()}
    rows = {row["name"]: row for row in json.loads(rwkv("info", path, "--json", "--tensors").stdout)["tensors"]}
    table = {line.split()[0]: line for line in rwkv("info", path, "--tensors").stdout.splitlines() if line}
    assert table["tensor"].endswith("bytes   error")
    for name, (entry, source) in registry.match(registry.detect(shapes), shapes).items():
        error = rows[name]["error"]
        if entry.kind == "vector":
            assert error is None
            assert not table[name].endswith("%")
            continue
        want = entry.derive(weights[source]) if entry.derive else weights[source]
        got = Checkpoint(path).tensor(name, entry.shape).float32()  # type: ignore[union-attr]
        assert error == pytest.approx(np.linalg.norm(got - want) / np.linalg.norm(want), rel=1e-3)
        assert table[name].endswith(f"  {error:.3%}")


@pytest.mark.parametrize("version", ["4", "6", "7"])
def test_a_heat_map_is_the_errors(rwkv: Run, converted: Any, tmp_path: Path, figures: list[Any], version: str) -> None:
    path, out = converted(version), tmp_path / "a.svg"
    result = rwkv("info", path, "--json", "--tensors", "--plot", out)
    drawn(result, out)
    facts = json.loads(result.stdout)
    want = {row["name"].removesuffix(".weight"): 100 * row["error"] for row in facts["tensors"] if row["error"]}
    inside, apart, _ = figures[0].axes
    got = {}
    for axes in (inside, apart):
        (mesh,), kinds = axes.collections, [label.get_text() for label in axes.get_yticklabels()]
        values = mesh.get_array().filled(math.nan)
        assert values.shape == (len(kinds), 3 if axes is inside else 1)
        for (row, layer), value in np.ndenumerate(values):
            if not math.isnan(value):
                got[f"blocks.{layer}.{kinds[row]}" if axes is inside else kinds[row]] = value
        assert mesh.get_clim() == (pytest.approx(min(want.values())), pytest.approx(max(want.values())))
    assert got == pytest.approx(want)
    said = words(out)
    assert set(said) >= {"Quantization error by layer and tensor", "relative root-mean-square error in %", "layer", "0"}
    assert f"{path.name} · RWKV-{version} · {facts['bits_per_weight']:.2f} bits per weight" in said
    assert sorted(text for text in said if re.fullmatch(r"\d\.\d\d", text))[0] == f"{min(want.values()):.2f}"
    assert said.count("–") == (2 if version == "7" else 0)  # layer 0 lacks v1 and v2
    if version == "7":
        kinds = [label.get_text() for label in inside.get_yticklabels()]
        assert kinds.index("att.v1") == kinds.index("att.a2") + 1


def test_many_layers_are_not_numbered_one_by_one(tmp_path: Path, figures: list[Any]) -> None:
    plot_errors(tmp_path / "a.svg", {f"blocks.{i}.att.key.weight": 0.004 + i / 1e6 for i in range(33)}, ["a"])
    ticks = [label.get_text() for label in figures[0].axes[0].get_xticklabels()]
    assert ticks == [str(i) for i in range(0, 33, 2)]
    assert len(figures[0].axes[0].texts) == 1  # the facts; no number in any cell


def changed(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A converted file with other entries of its tensors."""
    data = source.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    tensors = json.loads(header["__metadata__"]["tensors"])
    for entry in tensors.values():
        change(entry)
    header["__metadata__"]["tensors"] = json.dumps(tensors)
    text = json.dumps(header).encode()
    target.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    return target


def test_what_has_no_errors_is_refused(rwkv: Run, converted: Any, tmp_path: Path) -> None:
    needs("matplotlib", "dev")
    path = converted("7", "none")
    result = rwkv("info", path, "--plot", tmp_path / "a.png")
    tiny.refused(result, f"{path}: its weights are not quantized, so there is no error to draw")
    old = changed(converted("7", vocab=256), tmp_path / "old", lambda entry: entry.pop("error", None))
    result = rwkv("info", old, "--plot", tmp_path / "a.png")
    tiny.refused(result, f"{old}: does not say what quantizing cost; convert the model again")
    assert list(tmp_path.iterdir()) == [old]


def test_a_file_runs_whatever_it_says_of_errors(rwkv: Run, byte_model: Path, tmp_path: Path) -> None:
    want, _ = rwkv_cli.load(byte_model).forward([1, 2, 3])
    for error in (None, "x", True, 1, -0.1, math.nan, math.inf, [1]):
        path = changed(byte_model, tmp_path / "a", lambda entry, error=error: entry.update(error=error))  # type: ignore[misc]
        got, _ = rwkv_cli.load(path).forward([1, 2, 3])
        np.testing.assert_array_equal(got, want)
        result = rwkv("info", path, "--tensors")
        if error is None:
            assert result.exit_code == 0
        else:
            tiny.refused(result, f"{path}: tensor emb.weight is described wrongly; convert the model again")
