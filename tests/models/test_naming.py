"""The model that a checkpoint is: every version found by shapes alone, other namings undone, anything else refused."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import Result
from numpy.typing import NDArray
from tiny import refused

from rwkv_cli.errors import UnsupportedModelError
from rwkv_cli.models import Config, naming, registry
from rwkv_cli.quant import Checkpoint, open_source

Run = Callable[..., Result]
Shapes = dict[str, tuple[int, ...]]


def shapes_of(version: str) -> Shapes:
    return {name: array.shape for name, array in tiny.weights(version).items()}


def check(shapes: Shapes) -> Config:
    config = registry.detect(shapes)
    registry.match(config, shapes)
    return config


@pytest.mark.parametrize("version", [*tiny.VERSIONS, "5.0r2"])
@pytest.mark.parametrize(
    ("layers", "width", "head", "ffn", "vocab"),
    [(3, 48, 16, 96, 300), (1, 40, 8, 70, 256), (2, 33, 11, 5, 7), (12, 64, 64, 224, 65), (2, 6, 2, 1, 1)],
)
def test_a_model_is_known_by_its_shapes(version: str, layers: int, width: int, head: int, ffn: int, vocab: int) -> None:
    weights = tiny.weights(version, layers, width, vocab, head, ffn)
    config = check({name: array.shape for name, array in weights.items()})
    assert (config.version, config.layers, config.width, config.vocab) == (version, layers, width, vocab)
    assert config.ffn == ffn
    assert (config.heads, config.head_size) == ((1, width) if version == "4" else (width // head, head))
    seven = {"w": 8, "a": 12, "v": 20 if layers > 1 else 1, "g": 24}
    ranks = {"6": {"mix": 8, "decay": 12}, "7": seven, "7a": seven | {"s": 6}, "8-rc00": seven}
    assert config.ranks == ranks.get(version, {})


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_a_missing_tensor_is_named(version: str) -> None:
    shapes = shapes_of(version)
    for name in shapes:
        if name in ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"):
            continue
        rest = {other: shape for other, shape in shapes.items() if other != name}
        says = rf"^tensor {re.escape(name)} is missing"
        if name.startswith("blocks.0."):  # it may then be taken for another version, which lacks others
            says = r"^tensor \S+ (is missing|is not part of|has shape)|it has no time mixing in layer 0"
        with pytest.raises(UnsupportedModelError, match=says):
            check(rest)


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_a_tensor_of_another_shape_is_named(version: str) -> None:
    shapes = shapes_of(version)
    for name, shape in shapes.items():
        later = name.startswith(("blocks.2.", "ln_out", "head", "blocks.0.ln"))
        others = [(*shape[:-1], shape[-1] + 1), (shape[0] + 1, *shape[1:]), (), (0, *shape[1:]), (*shape, 2)]
        for other in others:
            if name.startswith(("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")):
                continue
            says = rf"^tensor {re.escape(name)} has shape \[" if later else "has shape|has the wrong|width|missing"
            with pytest.raises(UnsupportedModelError, match=says):
                check(shapes | {name: other})
        if len(shape) == 2 and shape[0] != shape[1] and later:
            with pytest.raises(UnsupportedModelError, match=rf"^tensor {re.escape(name)} .*, so it is transposed$"):
                check(shapes | {name: shape[::-1]})


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_an_extra_tensor_is_named(version: str) -> None:
    shapes = shapes_of(version) | {"blocks.1.att.new": (48,)}
    with pytest.raises(UnsupportedModelError, match=rf"^tensor blocks\.1\.att\.new is not part of RWKV-{version}"):
        check(shapes)
    with pytest.raises(UnsupportedModelError, match=r"^tensor blocks\.1\.att\.new \(and 2 more\) is not part of"):
        check(shapes | {"x": (1,), "blocks.77777.att.new": (1,)})


@pytest.mark.parametrize(
    ("added", "says"),
    [
        (
            "blocks.0.att.key.lora_A",
            r"a LoRA adapter; name its base model first, as in `rwkv convert BASE\.pth --adapter ADAPTER\.pth`",
        ),
        (
            "base_model.model.blocks.0.att.key.lora_B.weight",
            r"a LoRA adapter; name its base model first, as in `rwkv convert BASE\.pth --adapter ADAPTER\.pth`",
        ),
        (
            "blocks.0.att.key.lora.0",
            r"a LoRA adapter; name its base model first, as in `rwkv convert BASE\.pth --adapter ADAPTER\.pth`",
        ),
        ("blocks.0.att.key.init_lora_A", "the start of a PiSSA adapter; name its base model first"),
        (
            "blocks.0.att.key.disha",
            "a DiSHA adapter; name its base model first",
        ),
        (
            "blocks.0.att.key.bone",
            "a DiSHA adapter; name its base model first",
        ),
        ("proj.gate.weight", "a part of VisualRWKV, which reads pictures and is not supported; plain RWKV is"),
        ("blocks.1.qkv.qq.weight", r"RWKV-7b \(DeepEmbedAttention\), which is not supported; RWKV-7 and RWKV-7a are"),
        ("blocks.1.qkv.ennk.weight", "the hybrid preview of RWKV-8, which is not supported; the plain preview rc00 is"),
        ("blocks.0.rosa.x_q", "a preview of RWKV-8 with ROSA, which is not supported; of RWKV-8, the preview rc00 is"),
        ("rosa1.q.weight", "a preview of RWKV-8 with ROSA, which is not supported; of RWKV-8, the preview rc00 is"),
    ],
)
def test_a_relative_is_called_by_its_name(rwkv: Run, tmp_path: Path, added: str, says: str) -> None:
    weights = tiny.weights("7", layers=2, vocab=256) | {added: np.ones((4, 4), np.float32)}
    if "qkv" in added:  # RWKV-7b has all of 7a too
        weights["blocks.0.ffn.s_emb.weight"] = np.ones((4, 4), np.float32)
    path = tiny.write_pth(tmp_path / "a.pth", weights)
    refused(rwkv("convert", path), path, says, rf"\(found {re.escape(naming.plain(added))}\)")
    assert list(tmp_path.iterdir()) == [path]


def test_a_state_alone_is_no_model(rwkv: Run, tmp_path: Path) -> None:
    states = {f"blocks.{i}.att.time_state": np.ones((2, 4, 4), np.float32) for i in range(2)}
    path = tiny.write_pth(tmp_path / "a.pth", states)
    refused(rwkv("convert", path), path, "these are tuned initial states only; name its base model first")


D = (48, 48)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.embed_tokens.weight": D, "only": ()}, "not an RWKV model in a known naming"),
        ({"blocks.4.att.key.weight": D}, r"layer 3 is missing: there is no tensor blocks\.3\.\*"),
        ({"emb.weight": (300,)}, r"emb\.weight or the time mixing of layer 0 has the wrong number of dimensions"),
        ({"emb.weight": (300, 50)}, r"3 heads of 16 do not make up the width 50 of emb\.weight"),
        ({"emb.weight": (0, 48), "head.weight": (0, 48)}, "a dimension is out of range"),
        ({"emb.weight": (1 << 25, 48), "head.weight": (1 << 25, 48)}, "a dimension is out of range"),
        ({f"blocks.{i}.att.w1": (48, 0) for i in range(3)}, "a dimension is out of range"),
        ({"blocks.0.att.r_k": (48,)}, "the time mixing of layer 0 has the wrong number of dimensions"),
        ({"blocks.0.ffn.key.weight": ()}, "has the wrong number of dimensions"),
        ({"blocks.1.att.v1": ()}, "has the wrong number of dimensions"),
    ],
)
def test_what_cannot_be_a_model_is_refused(changes: dict[str, tuple[int, ...]], says: str) -> None:
    shapes = {} if "only" in changes else shapes_of("7")
    with pytest.raises(UnsupportedModelError, match=says):
        check(shapes | changes)


@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("broken", ["missing", "extra", "transposed", "longer"])
def test_the_command_names_file_and_tensor(rwkv: Run, tmp_path: Path, version: str, broken: str) -> None:
    weights, name = tiny.weights(version, layers=2), "blocks.1.ffn.value.weight"
    if broken == "missing":
        del weights[name]
    elif broken == "extra":
        name = "blocks.1.ffn.gate.weight"
        weights[name] = weights["head.weight"]
    else:
        weights[name] = weights[name].T if broken == "transposed" else np.repeat(weights[name], 2, 1)
    path = tiny.write_pth(tmp_path / "a.pth", weights)
    says = {"missing": "is missing", "extra": f"is not part of RWKV-{version}"}.get(broken, "has shape")
    refused(rwkv("convert", path, "--dry-run"), f"{path}: tensor {re.escape(name)}", says)
    assert list(tmp_path.iterdir()) == [path]


def transformers4(name: str) -> str:
    """As transformers' convert_rwkv_checkpoint_to_hf.py does it."""
    name = name.replace("emb.", "embeddings.").replace("blocks.0.ln0", "blocks.0.pre_ln")
    name = name.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
    for letter, word in (("k", "key"), ("v", "value"), ("r", "receptance"), ("g", "gate")):
        name = re.sub(rf"time_mix_{letter}$", f"time_mix_{word}", name)
    return name if name == "head.weight" else f"rwkv.{name}"


def fla6(weights: tiny.Tensors) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """As flash-linear-attention's convert_from_rwkv6.py does it."""
    names = {"emb.weight": "model.embeddings.weight", "head.weight": "lm_head.weight"}
    for part in ("weight", "bias"):
        names |= {f"ln_out.{part}": f"model.norm.{part}", f"blocks.0.ln0.{part}": f"model.layers.0.pre_norm.{part}"}
    yield from ((there, weights[here]) for here, there in names.items())
    for i in range(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))):
        att, ffn, layer = f"blocks.{i}.att.", f"blocks.{i}.ffn.", f"model.layers.{i}."
        for part in ("weight", "bias"):
            yield f"{layer}attn_norm.{part}", weights[f"blocks.{i}.ln1.{part}"]
            yield f"{layer}ffn_norm.{part}", weights[f"blocks.{i}.ln2.{part}"]
            yield f"{layer}attn.g_norm.{part}", weights[f"{att}ln_x.{part}"]
        yield f"{layer}attn.x_proj.0.mu", weights[att + "time_maa_x"].reshape(-1)
        width = weights["emb.weight"].shape[1]
        ww, wk, wv, wr, wg = weights[att + "time_maa_w1"].reshape(width, 5, -1).transpose(1, 0, 2)
        yield f"{layer}attn.x_proj.0.linear.weight", np.concatenate((wr, ww, wk, wv, wg), -1).T
        ww, wk, wv, wr, wg = weights[att + "time_maa_w2"]
        yield f"{layer}attn.x_proj.2.weight", np.concatenate((wr, ww, wk, wv, wg), 0).T
        yield f"{layer}attn.x_bias", np.stack([weights[f"{att}time_maa_{x}"].reshape(-1) for x in "rwkvg"])
        for there, here in (("r", "receptance"), ("k", "key"), ("v", "value"), ("g", "gate")):
            yield f"{layer}attn.{there}_proj.linear.weight", weights[f"{att}{here}.weight"]
        yield f"{layer}attn.w_proj.linear.lora.0.weight", weights[att + "time_decay_w1"].T
        yield f"{layer}attn.w_proj.linear.lora.2.weight", weights[att + "time_decay_w2"].T
        yield f"{layer}attn.w_proj.linear.lora.2.bias", weights[att + "time_decay"].reshape(-1)
        yield f"{layer}attn.bonus", weights[att + "time_faaaa"]
        yield f"{layer}attn.o_proj.weight", weights[att + "output.weight"]
        for there, here in (("key", "k"), ("receptance", "r")):
            yield f"{layer}ffn.{there}.linear.weight", weights[f"{ffn}{there}.weight"]
            yield f"{layer}ffn.{there}.mu", weights[f"{ffn}time_maa_{here}"].reshape(-1)
        yield f"{layer}ffn.value.weight", weights[ffn + "value.weight"]


def fla(weights: tiny.Tensors, stacked: bool) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """As flash-linear-attention's convert_from_rwkv7.py does it; `stacked`: as its first version did."""
    top = {"emb.weight": "model.embeddings.weight", "head.weight": "lm_head.weight"}
    attention = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "ln_x": "g_norm"}
    parts = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "att": "attn", "ffn": "ffn"}
    for name, array in weights.items():
        flat = array.reshape(-1) if array.shape[:2] == (1, 1) else array
        if not name.startswith("blocks."):
            yield top.get(name, name.replace("ln_out", "model.norm")), flat
            continue
        _, layer, part, own, *rest = name.split(".")
        if part == "att" and (low := re.fullmatch("([wavg])([012])", own)):
            if layer == "0" and own[0] == "v":
                continue
            end = ("2.bias", "0.weight", "2.weight")[int(low[2])]
            yield f"model.layers.{layer}.attn.{low[1]}_lora.lora.{end}", flat.T
        elif stacked and part == "att" and own.startswith("x_"):
            if own == "x_r":
                mixes = [weights[f"blocks.{layer}.att.x_{x}"].reshape(-1) for x in "rwkvag"]
                yield f"model.layers.{layer}.attn.x_x", np.stack(mixes)
        else:
            own = attention.get(own, own) if part == "att" else own
            yield ".".join(["model.layers", layer, parts[part], own, *rest]), flat


@pytest.mark.parametrize("naming_of", ["4", "5.2", "6", "6 fla", "7", "7 stacked", "7 prefixed", "4 prefixed"])
@pytest.mark.parametrize("write", [tiny.write_pth, tiny.write_safetensors])
def test_other_namings_are_the_same_model(
    rwkv: Run, tmp_path: Path, naming_of: str, write: Callable[..., Path]
) -> None:
    version, _, form = naming_of.partition(" ")
    weights = tiny.weights(version, layers=2)
    pairs: Iterable[tuple[str, NDArray[np.float32]]] = ((transformers4(n), a) for n, a in weights.items())
    if version == "7" or form == "fla":
        pairs = fla(weights, form == "stacked") if version == "7" else fla6(weights)
    renamed = {("_forward_module." if form == "prefixed" else "") + name: array for name, array in pairs}
    (tmp_path / "hf").mkdir()
    write(tmp_path / "hf" / ("model.safetensors" if write is tiny.write_safetensors else "pytorch_model.bin"), renamed)
    tiny.write_pth(tmp_path / "official.pth", weights)
    for name in ("hf", "official.pth"):
        result = rwkv("convert", tmp_path / name, tmp_path / f"{name}.out", "--quant", "none")
        assert result.exit_code == 0, result.stderr
    assert len({Checkpoint(tmp_path / f"{name}.out").digest for name in ("hf", "official.pth")}) == 1


@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("dtype", tiny.STORAGES)
def test_the_config_has_what_only_the_source_tells(tmp_path: Path, version: str, dtype: str) -> None:
    weights = tiny.weights(version, layers=2, head=8)
    config, tensors = registry.recognize(open_source(tiny.write_pth(tmp_path / "a.pth", weights, dtype)))
    assert config.embedding_dtype == (dtype if version < "7" else "F32")
    assert config.group_norm_eps == 64e-5
    assert {tensor.dtype for _, tensor in tensors.values()} == {dtype}
    if version == "7":
        for form, stacked in (("b", False), ("c", True)):
            path = tiny.write_safetensors(tmp_path / form, dict(fla(weights, stacked)), dtype)
            config, _ = registry.recognize(open_source(path))
            assert (config.embedding_dtype, config.group_norm_eps) == ("F32", 8e-5)
    if version == "6":
        path = tiny.write_safetensors(tmp_path / "b", dict(fla6(weights)), dtype)
        assert registry.recognize(open_source(path)).config.group_norm_eps == 1e-5


@pytest.mark.parametrize(
    ("name", "missing"),
    [("x_proj.0.linear.weight", "time_maa_w1"), ("x_proj.2.weight", "time_maa_w2"), ("x_bias", "time_maa_w")],
)
def test_stacks_that_cannot_be_divided_are_refused(tmp_path: Path, name: str, missing: str) -> None:
    weights = dict(fla6(tiny.weights("6", layers=2)))
    weights[f"model.layers.1.attn.{name}"] = np.ones((41, 43), np.float32)
    with pytest.raises(UnsupportedModelError, match=rf"^tensor blocks\.1\.att\.{missing} is missing"):
        registry.recognize(open_source(tiny.write_safetensors(tmp_path / "a", weights, "F32")))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("emb.weight", "emb"), ("head.weight", "head"), ("ln_out.bias", "ln_out.bias"),
        ("blocks.0.att.key.weight", "att.key"), ("blocks.11.att.time_maa_w2.k", "att.time_maa_w2.k"),
        ("blocks.3.ln1.weight", "ln1"), ("blocks.3.att.w1", "att.w1"),
    ],
)  # fmt: skip
def test_tensors_of_all_layers_are_of_one_kind(name: str, kind: str) -> None:
    assert naming.kind_of(name) == kind


def test_a_tensor_under_two_namings_is_refused(rwkv: Run, tmp_path: Path) -> None:
    weights = tiny.weights("7", layers=1)
    path = tiny.write_pth(tmp_path / "a.pth", weights | {"_forward_module.emb.weight": weights["emb.weight"]})
    refused(rwkv("convert", path), path, r"holds emb\.weight twice, under two namings")


def test_no_other_name_is_touched(tmp_path: Path) -> None:
    weights = tiny.weights("7") | {"odd": np.ones(6, np.float32), "blocks.0.att.x_x": np.ones((6, 2), np.float32)}
    assert list(naming.official(open_source(tiny.write_pth(tmp_path / "a.pth", weights)))) == list(weights)


@pytest.mark.parametrize("quant", ["int8", "none"])
def test_what_layer_0_never_uses_changes_nothing(rwkv: Run, tmp_path: Path, quant: str) -> None:
    weights = tiny.weights("7", layers=2)
    unused = [f"blocks.0.att.v{i}" for i in range(3)]
    files = []
    for part in ([], unused[:1], unused):
        (tmp_path / str(len(part))).mkdir()
        path = tmp_path / str(len(part)) / "a.pth"
        tiny.write_pth(path, {name: array for name, array in weights.items() if name not in part})
        assert rwkv("convert", path, path.with_suffix(".out"), "--quant", quant).exit_code == 0
        files.append(path.with_suffix(".out").read_bytes())
    assert files[0] == files[1] == files[2]
