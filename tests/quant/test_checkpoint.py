"""Converted files: what is in them, and that a damaged or foreign one is refused before it is used."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import Result
from damaged import read_or_refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny import refused

import rwkv_cli
from rwkv_cli.errors import FormatError
from rwkv_cli.models import registry
from rwkv_cli.quant import Checkpoint, Floats, Int8
from rwkv_cli.quant.dtypes import BITS

Run = Callable[..., Result]
Convert = Callable[..., Path]
Header = dict[str, Any]
SIZES = [{}, {"width": 40, "head": 8, "ffn": 70, "vocab": 301}, {"width": 96, "head": 32, "ffn": 224, "vocab": 257}]


def split(path: Path) -> tuple[Header, bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def joined(path: Path, header: Header, body: bytes) -> Path:
    """The file with this header, not padded, so that the arrays lie at odd places."""
    text = json.dumps(header).encode()
    text += b" " * (len(text) % 2 == 0)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def use(path: Path) -> None:
    """Everything that running a model reads."""
    model = rwkv_cli.load(path)
    model.forward([1, 2])
    assert model.tokenizer is not None
    model.tokenizer.encode("hi")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def model(converted: Convert) -> Path:
    return converted("7", layers=2, width=16, vocab=256, head=8, ffn=32)


@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_int8_is_within_half_a_step_of_the_source(converted: Convert, version: str, sizes: dict[str, int]) -> None:
    weights = tiny.weights(version, **sizes)
    shapes = {name: array.shape for name, array in weights.items()}
    checkpoint, seen = Checkpoint(converted(version, **sizes)), set()
    for name, (entry, source) in registry.match(registry.detect(shapes), shapes).items():
        want = entry.derive(weights[source]) if entry.derive else weights[source]
        got = checkpoint.tensor(name, entry.shape)
        if isinstance(got, Floats):
            assert (entry.kind, got.dtype) == ("vector", "F32")
            np.testing.assert_array_equal(got.bits, want.reshape(entry.shape))
            continue
        seen.add(got.layout)
        assert got.layout == {"matrix": "tile", "sparse": "columns", "table": "rows"}[entry.kind]
        steps = Int8(got.layout, got.shape, np.ones_like(got.values), got.scales, got.unit).float32()
        largest = Int8(got.layout, got.shape, got.values, np.full_like(got.scales, 0x3C00), 0).float32() == 127
        # a step of absmax / 128, rounded down to float16, leaves the largest value a step short and an eighth
        assert (np.abs(got.float32() - want) <= steps * np.where(largest, 1.126, 0.501)).all()
        assert np.linalg.norm(got.float32() - want) < 0.01 * np.linalg.norm(want)
    assert seen == {"tile", "columns", "rows"}


@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("dtype", tiny.STORAGES)
def test_quant_none_keeps_the_source_s_bits(rwkv: Run, tmp_path: Path, version: str, dtype: str) -> None:
    weights = tiny.rounded(tiny.weights(version, layers=2), dtype)
    weights["emb.weight"][0, :3] = -0.0, 1e-7, -1e10 if dtype != "F16" else -65504
    shapes = {name: array.shape for name, array in weights.items()}
    source = tiny.write_pth(tmp_path / "a", weights, dtype)
    assert rwkv("convert", source, tmp_path / "b", "--quant", "none").exit_code == 0
    checkpoint = Checkpoint(tmp_path / "b")
    for name, (entry, source) in registry.match(registry.detect(shapes), shapes).items():
        got = checkpoint.tensor(name, entry.shape)
        assert isinstance(got, Floats)
        want = entry.derive(weights[source]) if entry.derive else weights[source]
        layout, stored = ("vector", "F32") if entry.kind == "vector" else ("float", dtype)
        assert (checkpoint.layout(name)["layout"], got.dtype) == (layout, stored)
        assert got.bits.tobytes() == tiny.raw(want.reshape(entry.shape), stored)


@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("quant", ["int8", "none"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_safetensors_reader_opens_it(converted: Convert, version: str, quant: str, sizes: dict[str, int]) -> None:
    path = converted(version, quant, **sizes)
    checkpoint = Checkpoint(path)
    with safe_open(path, "np") as file:
        assert set(file.keys()) == set(checkpoint.stored)
        assert file.metadata()["format"] == "rwkv"
        for name, stored in checkpoint.stored.items():
            array = checkpoint.array(name)
            assert array.tobytes() == file.get_tensor(name).tobytes()
            assert not array.flags.writeable
            layer_table = name.endswith((".enn.weight", ".s_emb.weight"))
            aligned = stored.dtype == "I8" and not layer_table
            assert stored.start % (64 if aligned else BITS[stored.dtype].itemsize) == 0


def test_an_array_at_an_odd_place_is_read_all_the_same(model: Path, tmp_path: Path) -> None:
    want, _ = rwkv_cli.load(model).forward([1, 2, 3])
    moved = joined(tmp_path / "a", *split(model))
    checkpoint = Checkpoint(moved)
    assert all(stored.start % 2 for stored in checkpoint.stored.values())
    assert not any(checkpoint.array(name).flags.writeable for name in checkpoint.stored)
    got, _ = rwkv_cli.load(moved).forward([1, 2, 3])
    np.testing.assert_array_equal(got, want)


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(0, 1, exclude_max=True),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3),
)
def test_cut_and_changed_headers_are_refused_or_harmless(
    folder: Path, model: Path, share: float, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(model.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    for at, byte in changes:
        data[int(at * end)] = byte
    path = folder / "changed"
    path.write_bytes(data if changes else data[: int(share * len(data))])
    read_or_refused(path, use)
    if not changes:
        with pytest.raises(FormatError):
            use(path)


JUNK = [None, 0, -1, 1, 16, 9999, 10**6, 1 << 63, 10**30, 1.5, True, "", "7", "4", "tile", "rows", "columns", "float",
        "vector", "a\nb", [], [1], [16, 16], [0] * 99, {}, {"a": 1}]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to each value inside a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [at, *(place for key in keys for place in places(value[key], (*at, key)))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_metadata_may_hold_anything(folder: Path, model: Path, rwkv: Run, data: st.DataObject) -> None:
    header, body = split(model)
    metadata = header["__metadata__"]
    key = data.draw(st.sampled_from(["config", "config", "tensors", "tokenizer", "template", "quantization", "source"]))
    value = {"": json.loads(metadata[key])}
    *way, last = ("", *data.draw(st.sampled_from(places(value[""]))))
    inner: Any = value
    for step in way:
        inner = inner[step]
    inner[last] = data.draw(st.sampled_from(JUNK))
    metadata[key] = json.dumps(value[""])
    path = joined(folder / "junk", header, body)
    read_or_refused(path, use)
    result = rwkv("info", path, "--tensors")
    assert result.exit_code == 0 or re.fullmatch(f"Error: {path}: .*\n", result.stderr)


def with_metadata(path: Path, target: Path, **changes: str | None) -> Path:
    header, body = split(path)
    for key, value in changes.items():
        header["__metadata__"].pop(key)
        if value is not None:
            header["__metadata__"][key] = value
    return joined(target, header, body)


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("2", "written in format 2, newer than 1; upgrade rwkv-cli"),
        ("12345", "written in format 12345, newer than 1; upgrade rwkv-cli"),
        *((bad, "no format version in the file; convert the model again") for bad in (None, "", "x", "0", "-1", "１")),
        ("9" * 5000, "no format version in the file; convert the model again"),
    ],
)
def test_a_newer_format_is_refused(rwkv: Run, model: Path, tmp_path: Path, version: str | None, says: str) -> None:
    path = with_metadata(model, tmp_path / "a", format_version=version)
    for arguments in (("info", path), ("generate", "hi", "-m", path)):
        refused(rwkv(*arguments), f"{path}: {says}")


CONFIG = {"version": "7", "layers": 2, "width": 16, "vocab": 256, "heads": 2, "head_size": 8, "ffn": 32,
          "ranks": {"w": 8, "a": 12, "v": 20, "g": 24}, "norm_eps": 1e-5, "group_norm_eps": 64e-5}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": None}, "save it again as F32, F16 or BF16; if the model is quantized, convert the original"),
        ({"format": "pt"}, "save it again as F32, F16 or BF16; if the model is quantized, convert the original"),
        *(({key: bad}, f"{key}.*; convert the model again") for bad in (None, "", "[", "7", "[" * 100_000)
          for key in ("config", "tensors", "tokenizer", "template")),
        ({"tokenizer": '"tape"'}, "has a tokenizer of unknown kind 'tape'; upgrade rwkv-cli"),
        ({"tokenizer": '"world"'}, r"tokenizer\.bytes is missing; convert the model again"),
        ({"tensors": "{}"}, r"tensor emb\.weight is missing or described wrongly; convert the model again"),
        *(({"config": json.dumps(CONFIG | change)}, "config is damaged .*; convert the model again") for change in (
            {"layers": 0}, {"layers": 1.0}, {"width": 17}, {"vocab": 1 << 30}, {"version": "9"},
            {"version": []}, {"ranks": []}, {"ranks": {"w": 0}}, {"norm_eps": 0.0}, {"group_norm_eps": 2.0})),
        ({"config": json.dumps(CONFIG | {"more": 1})}, "its config has a field 'more' of a newer version; upgrade"),
        *(({"config": json.dumps(CONFIG | change)}, "convert the model again") for change in (
            {"layers": 3}, {"layers": 1 << 20}, {"version": "6"}, {"version": "4"}, {"heads": 4, "head_size": 4},
            {"ffn": 33}, {"vocab": 257}, {"ranks": {"w": 8, "a": 12, "v": 20}},
            {"ranks": {"w": 9, "a": 12, "v": 20, "g": 24}})),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_metadata_that_does_not_fit_is_refused(
    rwkv: Run, model: Path, tmp_path: Path, changes: dict[str, str | None], says: str
) -> None:
    path = with_metadata(model, tmp_path / "a", **changes)
    refused(rwkv("generate", "hi", "-m", path), says)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("head.weight", {"layout": "rows"}), ("head.weight", {"layout": "columns"}), ("head.weight", {"layout": None}),
        ("head.weight", {"layout": "float"}), ("head.weight", {"shape": [256]}), ("head.weight", {"shape": [16, 256]}),
        ("head.weight", {"shape": [256, 16, 1, 1, 1]}), ("head.weight", {"shape": [-256, -16]}),
        ("head.weight", {"unit": 101}), ("head.weight", {"unit": True}), ("head.weight", {"unit": None}),
        ("emb.weight", {"layout": "tile"}), ("blocks.1.ffn.value.weight", {"layout": "rows"}),
        ("ln_out.bias", {"layout": "tile", "unit": 1}), ("ln_out.bias", {"shape": [8, 2]}),
    ],
    ids=str,
)  # fmt: skip
def test_a_tensor_that_is_not_as_described_is_named(
    rwkv: Run, model: Path, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    described = json.loads(split(model)[0]["__metadata__"]["tensors"])
    described[name] |= changes
    path = with_metadata(model, tmp_path / "a", tensors=json.dumps(described))
    refused(rwkv("generate", "hi", "-m", path), f"{path}: tensor {re.escape(name)}")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("head.weight", {"dtype": "U8"}), ("head.weight.scale", {"dtype": "BF16"}), ("ln_out.bias", {"dtype": "I32"}),
        ("head.weight", {"shape": [256, 32]}), ("head.weight.scale", {"shape": [256, 1]}),
        ("ln_out.bias", {"shape": [2, 8]}), ("head.weight", None), ("head.weight.scale", None), ("ln_out.bias", None),
    ],
    ids=str,
)  # fmt: skip
def test_a_tensor_that_is_stored_otherwise_is_named(
    rwkv: Run, model: Path, tmp_path: Path, name: str, changes: dict[str, Any] | None
) -> None:
    header, body = split(model)
    if changes is None:
        header[f"{name}.old"] = header.pop(name)
    else:
        header[name] |= changes
    path = joined(tmp_path / "a", header, body)
    refused(
        rwkv("generate", "hi", "-m", path), f"{path}: tensor {re.escape(name.removesuffix('.scale'))}", "convert the"
    )


def test_a_float_matrix_of_integers_is_named(rwkv: Run, converted: Convert, tmp_path: Path) -> None:
    header, body = split(converted("7", "none", vocab=256))
    header["head.weight"]["dtype"] = "I32"
    path = joined(tmp_path / "a", header, body)
    refused(rwkv("generate", "hi", "-m", path), r"tensor head\.weight is stored as I32", "convert the model again")


@pytest.mark.parametrize("write", [tiny.write_pth, tiny.write_safetensors])
def test_a_source_given_to_info_says_how_to_convert_it(rwkv: Run, tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(tmp_path / "a.pth", tiny.weights("7", layers=1))
    refused(rwkv("info", path), f"{path}: not a converted model; convert it first: rwkv convert {path}")
    missing = tmp_path / "b"
    refused(rwkv("info", missing), f"{missing}: No such file or directory")


def test_a_folder_stands_for_the_converted_file_in_it(rwkv: Run, tmp_path: Path) -> None:
    tiny.write_pth(tmp_path / "a.pth", tiny.weights("7", layers=1, vocab=256))
    refused(rwkv("info", tmp_path), "not a converted model; convert it first")
    assert rwkv("convert", tmp_path / "a.pth").exit_code == 0
    assert rwkv("info", tmp_path).stdout == rwkv("info", tmp_path / "a.int8.safetensors").stdout
    assert rwkv("generate", "a", "-n", 2, "-m", tmp_path).exit_code == 0
    assert rwkv("convert", tmp_path / "a.pth", "--quant", "none").exit_code == 0
    refused(rwkv("info", tmp_path), "holds 2 converted models; name one, such as .*a.float.safetensors")


def test_converted_files_in_a_folder_are_not_converted_again(rwkv: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.write_pth(folder / "a.pth", tiny.weights("7", layers=1, vocab=256))
    assert rwkv("convert", folder / "a.pth").exit_code == 0
    assert rwkv("convert", folder, tmp_path / "again").exit_code == 0
    assert Checkpoint(tmp_path / "again").digest == Checkpoint(folder).digest
    (folder / "a.pth").unlink()
    refused(rwkv("convert", folder), "to convert in this folder")


def test_a_folder_with_two_models_names_both(rwkv: Run, tmp_path: Path) -> None:
    """Other things that trainers keep in a .pth beside a model do not matter."""
    tiny.write_safetensors(tmp_path / "model.safetensors", tiny.weights("7", layers=1, vocab=256))
    tiny.write_pth(tmp_path / "rng_state.pth", {"state": np.zeros(3, np.float32)})
    (tmp_path / "junk.pth").write_bytes(b"junk")
    assert rwkv("convert", tmp_path, "--dry-run").exit_code == 0
    tiny.write_pth(tmp_path / "other.pth", tiny.weights("7", layers=1, vocab=256, seed=1))
    refused(rwkv("convert", tmp_path), "holds model.safetensors and other.pth; name the one to convert")


@pytest.mark.parametrize("key", ["source", "template"])
def test_half_a_surrogate_pair_in_metadata_is_refused(rwkv: Run, byte_model: Path, tmp_path: Path, key: str) -> None:
    header, data = split(byte_model)
    header["__metadata__"][key] = r'"\ud800"'
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + data)
    refused(rwkv("info", tmp_path / "a"), f"metadata '{key}' is missing or damaged")


def test_half_a_surrogate_pair_in_a_template_is_refused(rwkv: Run, tmp_path: Path) -> None:
    tiny.write_pth(tmp_path / "a.pth", tiny.weights("7", layers=1, vocab=256))
    (tmp_path / "tokenizer_config.json").write_text(r'{"chat_template": "{{ messages }} \ud800"}')
    refused(rwkv("convert", tmp_path / "a.pth"), "tokenizer_config.json: holds half a surrogate pair")


def read_by_row(path: Path) -> list[range]:
    """The bytes of a file that the system reads by single pages, in any map of this process."""
    found: list[range] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.endswith(str(path)):
            (first, last), offset = (int(n, 16) for n in line.split()[0].split("-")), int(line.split()[2], 16)
            where = range(offset, offset + last - first)
        elif line.startswith("VmFlags:"):
            found += [where] if {"rr", "nh"} <= set(line.split()) and where else []
            where = range(0)
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="only Linux tells how a map is read")
@pytest.mark.parametrize("quant", ["int8", "none"])
@pytest.mark.parametrize(("version", "table"), [("7a", "s_emb"), ("8-rc00", "enn")])
def test_tables_are_read_by_row_and_lie_apart(converted: Convert, version: str, table: str, quant: str) -> None:
    """A token needs a row of a table. What lies around it is neither mapped in huge pages nor read ahead."""
    path = converted(version, quant, layers=2, vocab=5000)
    model = rwkv_cli.load(path)
    model.forward([1, 4999])
    by_row, stored = read_by_row(path), Checkpoint(path).stored
    ends = {name: (a.start, a.start + int(np.prod(a.shape)) * BITS[a.dtype].itemsize) for name, a in stored.items()}
    large = {name: (start + end) // 2 for name, (start, end) in ends.items() if end - start > 1 << 14}
    tables = {name for name in large if f".{table}." in name or name.startswith("emb.")}
    assert tables >= {"emb.weight", f"blocks.0.ffn.{table}.weight", f"blocks.1.ffn.{table}.weight"}
    assert large.keys() - tables >= {"head.weight"}
    for name, middle in large.items():
        assert any(middle in part for part in by_row) == (name in tables), name
    # those of layers come last among the arrays of their type
    for kind in {array.dtype for array in stored.values()}:
        order = [name for name in sorted(ends, key=ends.__getitem__) if stored[name].dtype == kind]
        ours = [name for name in order if f".{table}." in name]
        assert order[len(order) - len(ours) :] == ours
