"""The fields of a config.json that change the mathematics are honoured, or refused by their names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import Result
from naive import Naive, error_ratio, layer_norm
from tiny import refused

import rwkv_cli
from rwkv_cli.models import Config
from rwkv_cli.quant import Checkpoint

Run = Callable[..., Result]
IDS = [0, *np.random.default_rng(1).integers(0, 300, 30).tolist()]


def folder(path: Path, weights: tiny.Tensors, settings: Any) -> Path:
    path.mkdir()
    tiny.write_safetensors(path / "model.safetensors", weights, "F32")
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (path / "config.json").write_text(text)
    return path


def logits(rwkv: Run, source: Path, quant: str = "none") -> Any:
    result = rwkv("convert", source, source.with_suffix(".out"), "--quant", quant, "--force")
    assert result.exit_code == 0, result.stderr
    got, _ = rwkv_cli.load(source.with_suffix(".out")).forward(IDS, all_logits=True)
    return got


@pytest.mark.parametrize(
    ("version", "settings", "oracle"),
    [
        ("4", {"layer_norm_epsilon": 1e-2}, {"norm_eps": 1e-2, "output_norm_eps": 1e-5}),
        ("5.2", {"head_size_divisor": 4}, {"group_norm_eps": 16e-5}),
        (
            "6",
            {"head_size_divisor": 2, "layer_norm_epsilon": 1e-3},
            {"group_norm_eps": 4e-5, "norm_eps": 1e-3, "output_norm_eps": 1e-5},
        ),
        ("7", {"layer_norm_epsilon": 1e-2}, {"norm_eps": 1e-2}),
        ("7", {"norm_eps": 1e-2}, {"norm_eps": 1e-2}),
        ("7", {"group_norm_epsilon": 0.05}, {"group_norm_eps": 0.05}),
        ("7", {"hidden_act": "swish"}, {"silu": True}),
        ("7", {"hidden_act": "silu"}, {"silu": True}),
        ("7", {"hidden_act": "sqrelu", "hidden_size": 48, "nobody_knows": [1], "attn": None}, {}),
    ],
)
def test_a_number_of_the_config_is_in_the_logits(
    rwkv: Run, tmp_path: Path, version: str, settings: Any, oracle: Any
) -> None:
    weights = tiny.weights(version)
    want = Naive(version, weights, **oracle).forward(IDS)
    source = folder(tmp_path / "model", weights, settings)
    assert error_ratio(logits(rwkv, source), want) < 1e-5
    # a shard that is named by itself has its config beside it, too
    assert error_ratio(logits(rwkv, source / "model.safetensors"), want) < 1e-5
    assert error_ratio(logits(rwkv, source, "int8"), want) < 0.05
    if oracle:
        assert error_ratio(Naive(version, weights).forward(IDS), want) > 1e-4


def test_a_config_beside_a_pth_is_of_another_model(rwkv: Run, tmp_path: Path) -> None:
    weights = tiny.weights("7")
    (tmp_path / "config.json").write_text('{"norm_eps": 0.01}')
    source = tiny.write_pth(tmp_path / "a.pth", weights, "F32")
    assert error_ratio(logits(rwkv, source), Naive("7", weights).forward(IDS)) < 1e-5


@pytest.mark.parametrize("version", ["4", "7"])
def test_a_tied_head_is_the_embedding(rwkv: Run, tmp_path: Path, version: str) -> None:
    weights = tiny.weights(version)
    weights["head.weight"] = weights["emb.weight"]
    rest = {name: array for name, array in weights.items() if name != "head.weight"}
    got = logits(rwkv, folder(tmp_path / "tied", rest, {"tie_word_embeddings": True}))
    assert error_ratio(got, Naive(version, weights).forward(IDS)) < 1e-5
    logits(rwkv, tiny.write_pth(tmp_path / "whole.pth", weights, "F32"))
    assert Checkpoint(tmp_path / "tied.out").digest == Checkpoint(tmp_path / "whole.out").digest
    refused(rwkv("convert", folder(tmp_path / "cut", rest, {})), "tensor head.weight is missing")


def test_norms_without_bias_have_none(rwkv: Run, tmp_path: Path) -> None:
    weights = tiny.weights("7")
    biases = [name for name in weights if name.endswith(".bias")]
    rest = {name: array for name, array in weights.items() if name not in biases}
    got = logits(rwkv, folder(tmp_path / "model", rest, {"norm_bias": False}))
    want = Naive("7", rest | {name: np.zeros_like(weights[name]) for name in biases}).forward(IDS)
    assert error_ratio(got, want) < 1e-5
    refused(rwkv("convert", folder(tmp_path / "cut", rest, {"norm_bias": True})), "bias is missing")


@pytest.mark.parametrize("leftover", [True, False])
def test_an_embedding_with_its_norm_in_it_is_not_normed_again(rwkv: Run, tmp_path: Path, leftover: bool) -> None:
    weights = tiny.weights("7")
    norm = [weights[f"blocks.0.ln0.{part}"] for part in ("weight", "bias")]
    fused = {name: array for name, array in weights.items() if leftover or ".ln0." not in name}
    fused["emb.weight"] = layer_norm(weights["emb.weight"], *norm, 1e-5).astype(np.float32)
    source = folder(tmp_path / "model", fused, {"embedding_layer_norm_fused": True})
    assert error_ratio(logits(rwkv, source), Naive("7", weights).forward(IDS)) < 1e-5
    assert error_ratio(logits(rwkv, source, "int8"), Naive("7", weights).forward(IDS)) < 0.05


@pytest.mark.parametrize(
    ("version", "settings", "says"),
    [
        ("7", {"hidden_act": "gelu"}, r"has hidden_act 'gelu', but the channel mixing here has squared ReLU"),
        ("7", {"hidden_act": [1]}, r"has hidden_act \[1\], but"),
        ("4", {"hidden_act": "swish"}, r"has hidden_act 'swish', but"),
        ("4", {"attention_hidden_size": 64}, r"has attention_hidden_size 64, but only the width of the model \(48\)"),
        ("7", {"value_dim": [48, 96, 48]}, r"has value_dim \[48, 96, 48\], but only the width"),
        ("7", {"attn": {"layers": [1]}}, r"has attn .*, but a mixture with attention layers is not supported"),
        ("7", {"norm_first": False}, r"has norm_first False, but a model without the norm after its embedding"),
        ("7", {"norm_eps": "small"}, r"has norm_eps 'small', but it must be a positive number"),
        ("7", {"norm_eps": 0}, r"has norm_eps 0, but it must be a positive number"),
        ("7", {"norm_eps": 5}, r"its config\.json does not do: an epsilon is out of range"),
        ("7", {"embedding_layer_norm_fused": True, "tie_word_embeddings": True}, r"has tie_word_embeddings True, but"),
        ("7", {"quantization_config": {"quant_method": "awq"}}, r"quantized already \(.*awq\); convert the original"),
        ("7", {"quantization_config": {"quant_method": "bitsandbytes"}}, r"\(.*bitsandbytes\); convert the original"),
        ("7", {"quantization": {"group_size": 64, "bits": 4}}, r"quantized already \(.*MLX\); convert the original"),
        ("7", "[1]", r"config\.json: not a readable JSON object; download it again"),
        ("7", "{", r"config\.json: not a readable JSON object; download it again"),
        ("7", "[" * 100_000, r"config\.json: not a readable JSON object; download it again"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(
    rwkv: Run, tmp_path: Path, version: str, settings: Any, says: str
) -> None:
    refused(rwkv("convert", folder(tmp_path / "model", tiny.weights(version), settings)), tmp_path / "model", says)


@pytest.mark.parametrize("listed", [[1], {"weight_map": [1]}, {"weight_map": ["a"]}, {"weight_map": {"a": [1]}}])
def test_a_list_of_shards_that_makes_no_sense_is_named(rwkv: Run, tmp_path: Path, listed: Any) -> None:
    model = folder(tmp_path / "model", tiny.weights("7"), {})
    (model / "model.safetensors.index.json").write_text(json.dumps(listed))
    refused(rwkv("convert", model), "model.safetensors.index.json: not a readable shard index; download it again")


@pytest.mark.parametrize("architecture", ["rwkv7", ["rwkv7"], {}])
def test_a_config_is_never_taken_for_metadata_of_gguf(rwkv: Run, tmp_path: Path, architecture: Any) -> None:
    """Fields that a config.json does not have are ignored."""
    other = {"general.architecture": architecture, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.eos_token_id": 5}
    logits(rwkv, folder(tmp_path / "model", tiny.weights("7"), other))
    assert not Checkpoint(tmp_path / "model.out").has("ends")


@pytest.mark.parametrize(
    ("quantized", "settings", "says"),
    [
        ("U32", {"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ("I32", {"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ("U8", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ],
)
def test_quantized_folders_are_known_before_their_tensors_are_read(
    rwkv: Run, tmp_path: Path, quantized: str, settings: Any, says: str
) -> None:
    """They hold integers, which no other folder does."""
    source = folder(tmp_path / "model", {"emb.weight": np.ones((4, 4), np.float32)}, settings)
    file = source / "model.safetensors"
    data = file.read_bytes().replace(b'"F32"', f'"{quantized}"'.encode().ljust(5))
    file.write_bytes(data.replace(b"[4, 4]", b"[8, 8]") if quantized == "U8" else data)
    refused(rwkv("convert", source), source, rf"quantized already \(.*{says}\); convert the original model")
    (source / "config.json").unlink()
    refused(
        rwkv("convert", source), file, f"emb.weight is {quantized}", "if the model is quantized, convert the original"
    )


def test_a_usual_model_is_written_as_before() -> None:
    """Fields that came later are in the file only where they matter, and files without them load."""
    config = Config("7", 1, 64, 256, 1, 64, 256)
    assert {"embedding_normed", "ffn_activation"}.isdisjoint(config.as_json())
    other = Config("7", 1, 64, 256, 1, 64, 256, embedding_normed=True, ffn_activation="silu")
    assert [Config.from_json(each.as_json()) for each in (config, other)] == [config, other]


@pytest.mark.parametrize("field", [{"embedding_normed": 1}, {"ffn_activation": "gelu"}])
def test_a_damaged_field_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        Config.from_json(Config("7", 1, 64, 256, 1, 64, 256).as_json() | field)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("fla7-hidden_act-swish", "fla7-hidden_act"),
        ("fla7-norm_eps-1e-3", "fla7-eps"),
        ("hf5-head_size_divisor-4", "hf56-hf5-divisor4"),
    ],
)
def test_folders_of_other_programs_give_their_logits(
    rwkv: Run, tmp_path: Path, shared: Path, name: str, reference: str
) -> None:
    """The logits are those of flash-linear-attention 0.6.0 and of the remote code of rwkv-5-world."""
    cases = shared / "cases" / "interop"
    if not cases.is_dir():
        pytest.skip("no folders of other programs; the tests above cover the same on random weights")
    shutil.copytree(cases / name, tmp_path / "model")
    assert rwkv("convert", tmp_path / "model", tmp_path / "out", "--quant", "none").exit_code == 0
    ids = np.load(cases / "ref" / f"{reference}.ids.npy").reshape(-1)
    got, _ = rwkv_cli.load(tmp_path / "out").forward(ids, all_logits=True)
    assert np.abs(got - np.load(cases / "ref" / f"{reference}.ref.npy").reshape(got.shape)).max() < 5e-5
