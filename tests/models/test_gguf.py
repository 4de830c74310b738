"""GGUF files of RWKV-6 and 7, written by the `gguf` package, are the same models as their `.pth`."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from click.testing import Result
from foreign import write_gguf

import rwkv_cli
from rwkv_cli.engine.inside import tokenizer_inside
from rwkv_cli.engine.tokenizer import WorldTokenizer, official_vocabulary
from rwkv_cli.models import registry
from rwkv_cli.models.gguf import official
from rwkv_cli.quant import Checkpoint, open_source, read_settings
from rwkv_cli.quant.gguf import read_gguf
from rwkv_cli.quant.source import SourceFile, turned

Run = Callable[..., Result]
BYTES = [b"", b"a", b"b", b"\n\n", b"\xe4\xbd", b"it's", b'b"', b"\\", "é".encode()]


def weights_of(version: str, dtype: str = "F32", **sizes: int) -> tiny.Tensors:
    return tiny.rounded(tiny.weights(version, **{"width": 64, "head": 16, "ffn": 128, "vocab": 40, **sizes}), dtype)


# llama.cpp rescales RWKV-6 only, and half of a small number is rounded in float16.
FLOATS = [(version, dtype, 0) for version in ("6", "7") for dtype in ("F32", "F16", "BF16")]
RESCALED = [("6", dtype, layers) for dtype in ("F32", "BF16") for layers in (1, 2)]


@pytest.mark.parametrize(("version", "dtype", "rescale"), FLOATS + RESCALED)
def test_a_float_gguf_file_is_the_same_model(rwkv: Run, tmp_path: Path, version: str, dtype: str, rescale: int) -> None:
    weights = weights_of(version, dtype)
    tiny.write_pth(tmp_path / "a.pth", weights, dtype)
    write_gguf(tmp_path / "a.gguf", version, weights, dtype, rescale=rescale)
    digests, logits = [], []
    for name in ("a.pth", "a.gguf"):
        result = rwkv("convert", tmp_path / name, tmp_path / "out", "--quant", "none", "--force")
        assert result.exit_code == 0, result.stderr
        digests.append(Checkpoint(tmp_path / "out").digest)
        model = rwkv_cli.load(tmp_path / "out")
        logits.append(model.advance([1, 2, 3], model.new_state()))
    assert digests[0] == digests[1]
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("version", ["6", "7"])
def test_quantized_tensors_are_those_of_the_gguf_package(tmp_path: Path, version: str, kind: str) -> None:
    """Whole and row by row, and near to the numbers that were rounded."""
    weights = weights_of(version)
    path = write_gguf(tmp_path / "a", version, weights, kind)
    matched = registry.recognize(open_source(path), read_settings(path)).tensors
    for name in ("emb.weight", "blocks.1.att.output.weight", "blocks.2.ffn.value.weight"):
        _, tensor = matched[name]
        got = tensor.float32()
        other = gguf.quantize(weights[name], gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(got, gguf.dequantize(other, gguf.GGMLQuantizationType[kind]))
        np.testing.assert_array_equal(got[7:20], tensor.float32(7, 20))
        error = np.linalg.norm(got - weights[name]) / np.linalg.norm(weights[name])
        assert error < (0.01 if kind == "Q8_0" else 0.2)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q8_0"])
def test_every_kind_of_block_is_read_as_the_gguf_package_reads_it(tmp_path: Path, kind: str) -> None:
    """On blocks of random bits, whose scales are finite, also where a tensor lies turned."""
    chosen = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(1)
    shape = gguf.quant_shape_to_byte_shape((6, 512), chosen)
    blocks = rng.integers(0, 256, shape, np.uint8)
    blocks[blocks % 128 >= 124] = 0  # the upper byte of an infinite float16
    writer = gguf.GGUFWriter(tmp_path / "a", "rwkv7")
    writer.add_tensor("x", np.zeros(5, np.float32))
    writer.add_tensor("blk.0.time_mix_w1.weight", blocks, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = open_source(tmp_path / "a")["blk.0.time_mix_w1.weight"]
    expected = next(t for t in gguf.GGUFReader(tmp_path / "a").tensors if t.name == "blk.0.time_mix_w1.weight")
    values = gguf.dequantize(np.asarray(expected.data), chosen)
    assert tensor.shape == values.shape == (6, 512)
    np.testing.assert_array_equal(tensor.float32(), values)
    np.testing.assert_array_equal(tensor.float32(2, 5), values[2:5])
    np.testing.assert_array_equal(turned(tensor).float32(3, 400), values.T[3:400])


def test_a_quantized_gguf_file_converts_and_runs(rwkv: Run, tmp_path: Path) -> None:
    """Its logits are those of the numbers that the package reads."""
    weights = weights_of("7")
    path = write_gguf(tmp_path / "a.gguf", "7", weights, "Q8_0")
    result = rwkv("convert", path, tmp_path / "a", "--quant", "none")
    assert result.exit_code == 0, result.stderr
    assert "tokenizer world" in result.stdout
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, array in weights.items():
        if name.endswith(".weight") and array.ndim == 2:
            weights[name] = gguf.dequantize(gguf.quantize(array, kind), kind)
    tiny.write_pth(tmp_path / "b.pth", weights, "F32")
    assert rwkv("convert", tmp_path / "b.pth", tmp_path / "b", "--quant", "none").exit_code == 0
    assert Checkpoint(tmp_path / "a").digest == Checkpoint(tmp_path / "b").digest
    assert rwkv("generate", "ab", "-m", tmp_path / "a", "--max-tokens", "3").exit_code == 0


def test_the_reader_finds_what_the_packages_reader_finds(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "a", "6", weights_of("6"), "Q8_0", general__alignment=64, x__bool=7, x__list=[1.5, 2.5]
    )
    metadata, tensors = read_gguf(SourceFile(path))
    other = gguf.GGUFReader(path)
    for name, field in other.fields.items():
        if not name.startswith("GGUF."):
            assert metadata[name] == pytest.approx(field.contents()) or metadata[name] == field.contents()
    assert {t.name: t.data_offset for t in other.tensors} == {name: t.start for name, t in tensors.items()}


def test_the_tokenizer_comes_along(rwkv: Run, tmp_path: Path) -> None:
    """Padding and the token that begins a text have no text."""
    (tmp_path / "rwkv_vocab_x.txt").write_text("1 'x' 1\n")  # lies there by chance
    path = write_gguf(tmp_path / "a.gguf", "7", weights_of("7"))
    assert rwkv("convert", path, tmp_path / "a").exit_code == 0
    tokenizer = rwkv_cli.load(tmp_path / "a").tokenizer
    assert isinstance(tokenizer, WorldTokenizer)
    assert tokenizer.table == BYTES


def test_the_world_vocabulary_comes_back_whole() -> None:
    """Written as llama.cpp's converter writes it."""
    official = WorldTokenizer.from_vocabulary(official_vocabulary())
    tokens = ["<s>"] + [repr(token)[2:-1] for token in official.table[1:]] + ["[PAD]"] * 6
    found = tokenizer_inside(
        Path("a"),
        {
            "tokenizer.ggml.model": "rwkv",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3] + [1] * (len(official.table) - 1) + [5] * 6,
        },
    )
    assert found is not None
    assert found.table == official.table


def info(rwkv: Run, path: Path) -> dict[str, Any]:
    result = rwkv("info", path, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_chat_template_comes_along(rwkv: Run, tmp_path: Path) -> None:
    """A template in Jinja's language is the model's own. The name that every file has says nothing."""
    own = "{{ bos_token }}{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}assistant>"
    path = write_gguf(
        tmp_path / "a.gguf", "7", weights_of("7"), tokenizer__chat_template=own, tokenizer__ggml__bos_token_id=0
    )
    assert rwkv("convert", path, tmp_path / "a").exit_code == 0
    assert info(rwkv, tmp_path / "a")["template"] == "own"
    metadata = Checkpoint(tmp_path / "a").metadata("special_tokens", dict)
    assert metadata == {"bos_token": "<s>", "eos_token": ""}
    named = write_gguf(tmp_path / "rwkv7-g1d-0.1b.gguf", "7", weights_of("7"))
    assert rwkv("convert", named, tmp_path / "b").exit_code == 0
    assert info(rwkv, tmp_path / "b")["template"] == "g1"


def test_metadata_that_changes_results_is_honoured(rwkv: Run, tmp_path: Path) -> None:
    changes = {"rwkv7__attention__layer_norm_epsilon": 1e-3, "tokenizer__ggml__eos_token_id": 2}
    path = write_gguf(tmp_path / "a.gguf", "7", weights_of("7"), **changes)
    assert rwkv("convert", path, tmp_path / "a").exit_code == 0
    checkpoint = Checkpoint(tmp_path / "a")
    assert checkpoint.metadata("config", dict)["norm_eps"] == 1e-3
    assert checkpoint.metadata("ends", list) == [0, 2]


@pytest.mark.parametrize(
    ("version", "changes", "says"),
    [
        ("7", {"general__architecture": "llama"}, "a GGUF file of the architecture 'llama'; of these, rwkv6 and rwkv7"),
        ("6", {"general__architecture": "rwkv6qwen2"}, "a GGUF file of the architecture 'rwkv6qwen2'"),
        ("7", {"rwkv7__token_shift_count": 1}, r"its metadata has rwkv7\.token_shift_count 1, but"),
        ("7", {"rwkv7__wkv__head_size": 48}, r"its metadata has rwkv7\.wkv\.head_size 48, but"),
        ("7", {"rwkv7__wkv__head_size": None}, r"its metadata has rwkv7\.wkv\.head_size None, but"),
        ("6", {"rwkv6__wkv__head_size": 32}, r"its metadata has rwkv6\.wkv\.head_size 32, but its tensors have 16"),
        ("7", {"rwkv7__rescale_every_n_layers": 6}, "rescale_every_n_layers 6, but only RWKV-6"),
        ("7", {"rwkv7__attention__decay_lora_rank": 9}, r"decay_lora_rank 9, but its tensors have 8"),
        ("6", {"rwkv6__time_mix_extra_dim": 9}, r"time_mix_extra_dim 9, but its tensors have 8"),
        ("7", {"rwkv7__block_count": 4}, r"rwkv7\.block_count 4, but its tensors have 3"),
        ("7", {"rwkv7__attention__layer_norm_epsilon": 2.0}, "an epsilon is out of range"),
        ("7", {"split__count": 2}, "one of 2 parts of a model; join them with `llama-gguf-split --merge`"),
        ("7", {"general__alignment": 3}, r"general\.alignment is 3; download the file again"),
        ("7", {"tokenizer__ggml__model": "gpt2"}, "its tokenizer is of the kind 'gpt2'.*--tokenizer"),
        ("7", {"tokenizer__ggml__token_type": [1]}, "the vocabulary in it is damaged; give one with --tokenizer"),
        ("7", {"tokenizer__ggml__tokens": ["a" * 300] * 40}, "no tokens, or too long ones; give one with --tokenizer"),
        ("7", {"tokenizer__chat_template": "{% for %}"}, "the model's own chat template fails .* --template"),
    ],
)  # fmt: skip
def test_what_a_gguf_file_cannot_have_is_named(
    rwkv: Run, tmp_path: Path, version: str, changes: dict[str, Any], says: str
) -> None:
    path = write_gguf(tmp_path / "a.gguf", version, weights_of(version), **changes)
    tiny.refused(rwkv("convert", path), f"{path}: ", says)
    assert list(tmp_path.iterdir()) == [path]


def damaged(data: bytes) -> dict[str, bytes]:
    """Files that are not whole, by what is wrong with them."""
    name = b"token_embd.weight"
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4  # two sizes, the type and the offset

    def with_(place: int, form: str, value: int) -> bytes:
        return data[:place] + struct.pack(form, value) + data[place + struct.calcsize(form) :]

    return {
        "a GGUF file of version 1; versions 2 and 3 are read": with_(4, "<I", 1),
        "a big-endian GGUF file": with_(4, ">I", 3),
        "truncated or damaged": with_(8, "<Q", 1 << 60),
        "truncated or damaged;": with_(16, "<Q", 1 << 60),
        "truncated or damaged; download": data[:2000],
        "the file is truncated or damaged": data[:20],
        "lies beyond the end: the file is truncated": data[:-3000],
        "token_embd.weight has the shape": with_(at, "<Q", 0),
        "token_embd.weight lies beyond the end": with_(at + 8, "<Q", 1 << 40),
        "its tensors lie over each other": with_(at + 8, "<Q", (len(data) - 16000) // 256),
        "token_embd.weight is of the unknown type 999": with_(at + 16, "<I", 999),
        "token_embd.weight is IQ1_S, which is not read": with_(at + 16, "<I", 19),
    }


def test_damage_is_named(rwkv: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for says, data in damaged(write_gguf(path, "7", weights_of("7")).read_bytes()).items():
        path.write_bytes(data)
        tiny.refused(rwkv("convert", path), path, says)
        tiny.refused(rwkv("info", path), path, says)
    write_gguf(path, "7", weights_of("7"))
    tiny.refused(rwkv("info", path), path, "not a converted model; convert it first")


def test_no_damage_of_the_header_is_a_traceback(rwkv: Run, tmp_path: Path) -> None:
    """A byte here or there is another one, and the file ends anywhere."""
    path = tmp_path / "a.gguf"
    data = write_gguf(path, "7", weights_of("7", layers=1)).read_bytes()
    header = data.index(b"output.weight")
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(data)
        for at in rng.integers(4, header, rng.integers(1, 4)):
            broken[at] = rng.integers(256)
        path.write_bytes(broken[: rng.integers(1, len(data))] if rng.random() < 0.2 else broken)
        result = rwkv("convert", path, "--dry-run")
        assert result.exit_code == 0 or result.stderr.startswith("Error: "), result.stderr


@pytest.mark.parametrize("tokens", [[1, 2], 5, "abc"])
def test_a_template_beside_tokens_that_are_no_texts(rwkv: Run, tmp_path: Path, tokens: Any) -> None:
    """Without the name of a tokenizer, nothing is read of its tokens."""
    chat = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
    said = {"tokenizer__chat_template": chat, "tokenizer__ggml__bos_token_id": 0, "tokenizer__ggml__model": None}
    path = write_gguf(tmp_path / "a.gguf", "7", weights_of("7"), tokenizer__ggml__tokens=tokens, **said)
    assert rwkv("convert", path, "--dry-run").exit_code == 0


def test_an_architecture_that_is_no_text_is_named(rwkv: Run, tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "a.gguf", "7", weights_of("7")).read_bytes()
    at = data.index(b"general.architecture") + len(b"general.architecture")
    array = struct.pack("<IIQ", 9, 4, 1) + bytes(4)
    (tmp_path / "a.gguf").write_bytes(data[:at] + array + data[at + 4 + 8 + 5 :])
    refused = rwkv("convert", tmp_path / "a.gguf", "--dry-run")
    tiny.refused(refused, tmp_path / "a.gguf", r"a GGUF file of the architecture \[0\]")


def test_halvings_beyond_all_numbers_are_no_crash(tmp_path: Path) -> None:
    names = {"blocks.0.att.output.weight", "blocks.9999.att.output.weight"}
    stored = open_source(write_gguf(tmp_path / "b.gguf", "6", weights_of("6"), rescale=1))
    source = {name.replace("blk.1.", "blk.9999."): tensor for name, tensor in stored.items()}
    found = official(source, {"general.architecture": "rwkv6", "rwkv6.rescale_every_n_layers": 1}).tensors
    assert names <= set(found)
    assert np.isinf(found["blocks.9999.att.output.weight"].float32()).any()


def test_metadata_of_any_length_takes_little_memory(rwkv: Run, tmp_path: Path) -> None:
    """A list of small numbers takes eight times its bytes."""
    count = 200 << 20
    with (tmp_path / "a.gguf").open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a")
        file.write(struct.pack("<IIQ", 9, 0, count))
        file.truncate(count + 60)
    tracemalloc.start()
    tiny.refused(rwkv("convert", tmp_path / "a.gguf"), "its metadata is longer than any model's")
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
