"""Checkpoints of training programs are the same model as its plain `.pth`, or are named for what they are."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import Result
from extras import needs
from tiny import Call, Persistent, Ref, refused

from rwkv_cli.quant import Checkpoint

Run = Callable[..., Result]
WEIGHTS = tiny.weights("7", layers=2, vocab=256)
INTEGER = Call(
    Ref("torch._utils", "_rebuild_tensor_v2"),
    Persistent(("storage", Ref("torch", "LongStorage"), "step", "cpu", 1)), 0, (), (), False, {},
)  # fmt: skip
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def digest(rwkv: Run, source: Path) -> str:
    out = source.parent / "out.safetensors"
    result = rwkv("convert", source, out, "--quant", "none", "--force")
    assert result.exit_code == 0, result.stderr
    return Checkpoint(out).digest


@pytest.fixture
def plain(rwkv: Run, tmp_path: Path) -> str:
    (tmp_path / "plain").mkdir()
    return digest(rwkv, tiny.write_pth(tmp_path / "plain" / "a.pth", WEIGHTS, "F32"))


def tree_of(prefix: str = "") -> dict[str, Any]:
    return {
        prefix + name: tiny.tensor(name, "F32", a.size, 0, a.shape, tiny.contiguous(a.shape))
        for name, a in WEIGHTS.items()
    }


STORAGES = {name: tiny.raw(array, "F32") for name, array in WEIGHTS.items()} | {"step": bytes(8)}
OPTIMIZER = {"state": {0: {"step": INTEGER}}, "param_groups": ()}


@pytest.mark.parametrize(
    "tree",
    [
        {"state_dict": tree_of(), "epoch": 3, "pytorch-lightning_version": "1.9.5", "optimizer_states": OPTIMIZER},
        {"optimizer": OPTIMIZER, "step": INTEGER, "model": tree_of()},
        {"module": tree_of("module."), "ds_version": "0.14", "ds_config": {"zero_optimization": {"stage": 2}}},
        tree_of() | {"extra_step": INTEGER},
        tree_of() | {"_metadata_note": "trained by me", "epoch": 3, "done": True, "arguments": {"lr": None}, 5: "five"},
    ],
    ids=["lightning", "model", "deepspeed 2", "integer", "text"],
)
def test_what_lies_around_the_model_is_left_out(rwkv: Run, tmp_path: Path, plain: str, tree: Any) -> None:
    tiny.write_zip(tmp_path / "a.pth", tree, STORAGES)
    assert digest(rwkv, tmp_path / "a.pth") == plain


@pytest.mark.parametrize(
    "prefix",
    ["_forward_module.", "module.", "_orig_mod.", "model.", "base_model.model.", "rwkv7.", "rwkv.",
     "_forward_module._orig_mod.", "module._orig_mod.model."],
)  # fmt: skip
@pytest.mark.parametrize("write", [tiny.write_pth, tiny.write_safetensors])
def test_prefixes_are_taken_off(rwkv: Run, tmp_path: Path, plain: str, prefix: str, write: Callable[..., Path]) -> None:
    for bare in ("", "head."):  # the head of a Hugging Face folder lies beside the model
        renamed = {name if bare and name.startswith(bare) else prefix + name: a for name, a in WEIGHTS.items()}
        assert digest(rwkv, write(tmp_path / "a.pth", renamed, "F32")) == plain


def test_names_inside_of_a_compiled_block_are_plain_too(rwkv: Run, tmp_path: Path, plain: str) -> None:
    renamed = {name.replace(".att.", "._orig_mod.att."): array for name, array in WEIGHTS.items()}
    assert digest(rwkv, tiny.write_pth(tmp_path / "a.pth", renamed, "F32")) == plain


def test_hugging_face_names_of_rwkv_7_blocks(rwkv: Run, tmp_path: Path, plain: str) -> None:
    """transformers-rwkv calls the embedding so, and llama.cpp's converter takes the others."""
    words = {"emb.": "embeddings.", ".att.": ".attention.", ".ffn.": ".feed_forward."}
    renamed = {}
    for name, array in WEIGHTS.items():
        for word, longer in words.items():
            name = name.replace(word, longer)
        renamed[f"model.{name}"] = array
    assert digest(rwkv, tiny.write_safetensors(tmp_path / "a.safetensors", renamed, "F32")) == plain


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_float64_is_rounded(rwkv: Run, tmp_path: Path, plain: str, ending: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(tiny.STORAGES, "F64", "DoubleStorage")
    monkeypatch.setattr(tiny, "raw", lambda array, _: array.astype("<f8").tobytes())
    write = tiny.write_pth if ending == "pth" else tiny.write_safetensors
    assert digest(rwkv, write(tmp_path / f"a.{ending}", WEIGHTS, "F64")) == plain
    huge = WEIGHTS | {"ln_out.bias": np.full(48, 1e300)}
    refused(rwkv("convert", write(tmp_path / f"a.{ending}", huge, "F64")), "ln_out.bias holds NaN or infinity")


def test_shards_of_pytorch_model_bin(rwkv: Run, tmp_path: Path, plain: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    names = sorted(WEIGHTS)
    for i in range(2):
        part = {f"rwkv7.{name}": WEIGHTS[name] for name in names[i::2]}
        tiny.write_pth(folder / f"pytorch_model-0000{i + 1}-of-00002.bin", part, "F32")
    assert digest(rwkv, folder) == plain


def legacy(tree: Any, storages: dict[str, bytes], little: bool = True, items: int = 4) -> bytes:
    """A file as torch before 1.6 wrote it."""
    parts = [MAGIC, tiny.pickled(1001), tiny.pickled({"protocol_version": 1001, "little_endian": little})]
    parts.append(tiny.pickled(tree))
    keys = b"".join(tiny.pickled(key)[2:-1] + b"a" for key in storages)
    parts.append(b"\x80\x02]" + keys + b".")
    for key, data in storages.items():
        parts += [struct.pack("<q", len(data) // (8 if key == "step" else items)), data]
    return b"".join(parts)


def as_in_legacy(tree: Any) -> Any:
    """The tree with the sixth element that a storage had then."""
    if isinstance(tree, dict):
        return {name: as_in_legacy(value) for name, value in tree.items()}
    if isinstance(tree, Call) and isinstance(tree.arguments[0], Persistent):
        return Call(tree.function, Persistent((*tree.arguments[0].value, None)), *tree.arguments[1:])
    return tree


@pytest.mark.parametrize("extra", [{}, {"step": INTEGER}], ids=["plain", "integer"])
def test_a_file_from_before_torch_1_6_is_read(rwkv: Run, tmp_path: Path, plain: str, extra: dict[str, Any]) -> None:
    tree = as_in_legacy({"state_dict": tree_of() | extra})
    storages = dict(reversed(STORAGES.items()))
    if not extra:
        del storages["step"]
    (tmp_path / "a.pth").write_bytes(legacy(tree, storages))
    assert digest(rwkv, tmp_path / "a.pth") == plain


def test_torch_itself_writes_such_a_file(rwkv: Run, tmp_path: Path, plain: str) -> None:
    torch = needs("torch", "dev,reference", "the tests above write such files")
    tree = {name: torch.from_numpy(array) for name, array in WEIGHTS.items()} | {"step": torch.tensor(3)}
    torch.save(tree, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert digest(rwkv, tmp_path / "a.pth") == plain


ONE = {"a": tiny.tensor("0", "F32", 6, 0, (6,), (1,))}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (MAGIC, r"broken or truncated torch file \(its pickle makes no sense\); download it again"),
        (legacy(ONE, {"0": bytes(24)}, little=False), "saved on a big-endian machine"),
        (legacy(ONE, {}), r"tensor a: its data \(storage '0'\) is missing; download it again"),
        (legacy(ONE, {"0": bytes(24), "1": bytes(4)}), "its storages cannot be told apart, since it holds one without"),
        (legacy(ONE, {"0": bytes(20)}), r"broken or truncated torch file \(storage '0'\); download it again"),
        (legacy(ONE, {"0": bytes(24)})[:-1], r"broken or truncated torch file \(storage '0'\); download it again"),
        (legacy({"a": tiny.tensor("0", "F32", 6, 1, (6,), (1,))}, {"0": bytes(24)}), "past the end of its storage"),
        (
            legacy({"a": tiny.tensor("0", "F32", 6, 0, (1 << 20, 5), (0, 1))}, {"0": bytes(24)}),
            "describe tensors of 20971520 bytes; save plain copies",
        ),
        (legacy(Call(Ref("os", "system"), "touch ran"), {}), r"nothing in it was run: it asks for 'os\.system'"),
        (legacy("text", {}), "holds str, not a dictionary of tensors"),
        (b"\x80\x04K\x01.", r"a pickle that torch\.save did not write; give a checkpoint"),
    ],
)
def test_a_damaged_file_from_before_torch_1_6_is_refused(rwkv: Run, tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "a.pth").write_bytes(data)
    refused(rwkv("convert", tmp_path / "a.pth"), tmp_path / "a.pth", says)


def test_squeezed_vectors_are_the_same(rwkv: Run, tmp_path: Path, plain: str) -> None:
    squeezed = {
        name: array[None, None] if array.ndim == 1 and ".att." in name and "ln_x" not in name else array.squeeze()
        for name, array in WEIGHTS.items()
    }
    assert digest(rwkv, tiny.write_pth(tmp_path / "a.pth", squeezed, "F32")) == plain


SIZE = Call(Ref("torch", "Size"), (3, 4))
NOTHING = Call(Ref("__builtin__", "set"), ())


def test_the_facts_that_deepspeed_2_keeps_are_left_out(rwkv: Run, tmp_path: Path, plain: str) -> None:
    tree = {"module": tree_of(), "param_shapes": ({"emb.weight": SIZE},), "sparse_tensor_module_names": NOTHING}
    tiny.write_zip(tmp_path / "mp_rank_00_model_states.pt", tree, STORAGES)
    assert digest(rwkv, tmp_path / "mp_rank_00_model_states.pt") == plain


@pytest.mark.parametrize(
    "name", ["zero_pp_rank_0_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt"]
)
def test_a_part_of_deepspeed_says_how_to_gather_all(rwkv: Run, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    tiny.write_zip(path, {"module": tree_of()}, STORAGES)
    refused(
        rwkv("convert", path), path, "one part of a DeepSpeed checkpoint", r"`python zero_to_fp32\.py \. pytorch_model"
    )


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (
            ("torch.nn.modules.linear", "Linear"),
            r"a whole module\? save its weights alone, with torch\.save\(model\.state_dict",
        ),
        (("__main__", "RWKV"), r"'__main__\.RWKV', which no tensor needs; a whole module\?"),
        (
            ("torch._utils", "_rebuild_tensor_v3"),
            "it holds numbers of a kind such as float8; save it again in bfloat16",
        ),
        (("torch._utils", "_rebuild_qtensor"), "it holds quantized tensors; give the model as it was before"),
    ],
)
@pytest.mark.parametrize("key", ["model", ""])
def test_what_torch_saves_otherwise_is_named(
    rwkv: Run, tmp_path: Path, asked: tuple[str, str], says: str, key: str
) -> None:
    what = Call(Ref(*asked))
    tiny.write_zip(tmp_path / "a.pth", {key: what} if key else what, {})
    refused(rwkv("convert", tmp_path / "a.pth"), tmp_path / "a.pth", "nothing in it was run", says)


def test_whole_modules_of_torch_itself(rwkv: Run, tmp_path: Path) -> None:
    torch = needs("torch", "dev,reference", "the test above writes such files")
    torch.save(torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path / "module.pth")
    torch.save({"a": torch.ones(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "float8.pth")
    refused(rwkv("convert", tmp_path / "module.pth"), r"a whole module\? save its weights alone")
    refused(rwkv("convert", tmp_path / "float8.pth"), "a kind such as float8; save it again in bfloat16")


def test_a_deepspeed_folder_says_how_to_gather_it(rwkv: Run, tmp_path: Path, plain: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "zero_to_fp32.py").touch()
    refused(rwkv("convert", folder), folder, r"`python zero_to_fp32\.py \. pytorch_model\.bin`", "convert that file")
    tiny.write_pth(folder / "pytorch_model.bin", WEIGHTS, "F32", prefix="_forward_module.")
    assert digest(rwkv, folder) == plain


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_part_of_a_model_is_no_model(rwkv: Run, tmp_path: Path, plain: str, ending: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    stem = "model" if ending == "safetensors" else "pytorch_model"
    write = tiny.write_safetensors if ending == "safetensors" else tiny.write_pth
    for i in range(2):
        part = dict(sorted(WEIGHTS.items())[i::2])
        write(folder / f"{stem}-0000{i + 1}-of-00002.{ending}", part, "F32")
    assert digest(rwkv, folder) == plain
    part_2 = folder / f"{stem}-00002-of-00002.{ending}"
    refused(rwkv("convert", part_2), part_2, "part 2 of 2 of a model; give the folder with all of them")
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text('{"weight_map": {}}')
    refused(rwkv("convert", index), index, "the list of a model's parts; give the folder with all of them")
    alone = write(tmp_path / f"{stem}-00001-of-00001.{ending}", WEIGHTS, "F32")
    assert digest(rwkv, alone) == plain
