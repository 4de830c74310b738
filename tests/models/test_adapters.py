"""Adapters are merged as RWKV-PEFT's own programs do it, or are refused with the names of their tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import Result
from naive import Naive, error_ratio
from numpy.typing import NDArray
from tiny import refused

import rwkv_cli
from rwkv_cli.quant import Checkpoint

Run = Callable[..., Result]
F64 = NDArray[np.float64]
WEIGHTS = tiny.weights("7", layers=2, vocab=256)
MATRICES = ("att.key", "att.output", "ffn.key", "ffn.value")
IDS = [0, *np.random.default_rng(1).integers(0, 256, 20).tolist()]


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng((seed, *shape)).standard_normal(shape) * 0.2).astype(np.float32)


def low_rank(first: str = "lora_A", second: str = "lora_B", rank: int = 4, seed: int = 0) -> tiny.Tensors:
    out: tiny.Tensors = {}
    for i in range(2):
        for name in MATRICES:
            rows, columns = WEIGHTS[f"blocks.{i}.{name}.weight"].shape
            out[f"blocks.{i}.{name}.{first}"] = normal(rank, columns, seed=seed + i)
            out[f"blocks.{i}.{name}.{second}"] = normal(rows, rank, seed=seed + i)
    return out


def merge_pairs(weights: tiny.Tensors, adapter: tiny.Tensors, alpha: float) -> dict[str, Any]:
    """RWKV-PEFT, merge/merge_lora.py, line by line, without torch and in float64."""
    w: dict[str, Any] = {k: a.astype(np.float64) for k, a in {**weights, **adapter}.items()}
    out = {}
    for k in list(w):
        prefix = k[: -len(".weight")]
        lora_A, lora_B = prefix + ".lora_A", prefix + ".lora_B"
        if k.endswith(".weight") and lora_A in w:
            assert w[lora_B].shape[1] == w[lora_A].shape[0]
            lora_r = w[lora_B].shape[1]
            out[k] = w[k] + w[lora_B] @ w[lora_A] * (alpha / lora_r)
        elif "lora" not in k:
            out[k] = w[k]
    return out


def merge_disha(weights: tiny.Tensors, adapter: tiny.Tensors, word: str) -> dict[str, Any]:
    """RWKV-PEFT, merge/merge_disha.py, line by line, without torch and in float64."""
    w: dict[str, Any] = {k: a.astype(np.float64) for k, a in {**weights, **adapter}.items()}
    out = {}
    for k in list(w):
        gbmm = k[: -len(".weight")] + f".{word}"
        if k.endswith(".weight") and gbmm in w:
            if w[gbmm].ndim == 3:
                b, r, _ = w[gbmm].shape
                disha = w[k].reshape(-1, r, b, r).transpose(0, 2, 1, 3) @ w[gbmm] + w[gbmm]
                out[k] = w[k] + disha.transpose(0, 2, 1, 3).reshape(w[k].shape)
                continue
            r, b = w[gbmm].shape
            in_features = w[k].shape[-1]
            last_size, n_block = in_features % r, in_features // r
            size = n_block * r
            out[k] = w[k].copy()
            t = w[k][:, :size].reshape(-1, n_block, r).transpose(1, 2, 0) + w[gbmm]
            out[k][:, :size] = t.transpose(2, 0, 1).reshape(w[k][:, :size].shape)
            if last_size:
                out[k][:, size:] = w[k][:, size:] + w[gbmm].T[:, :last_size]
        elif word not in k:
            out[k] = w[k]
    return out


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_pth(tmp_path / "base.pth", WEIGHTS, "F32")


def converted(rwkv: Run, base: Path, *adapters: object, quant: str = "none") -> Path:
    out = base.parent / "out.safetensors"
    result = rwkv("convert", base, out, "--force", "--quant", quant, *adapters)
    assert result.exit_code == 0, result.stderr
    return out


def check(path: Path, want: dict[str, Any]) -> None:
    """The file holds these weights, rounded once to float32, and gives the logits of the model that has them."""
    stored = Checkpoint(path)
    for name, value in want.items():
        if name.endswith(MATRICES_WEIGHT):
            np.testing.assert_array_equal(stored.tensor(name, value.shape).bits, value.astype(np.float32))
    got, _ = rwkv_cli.load(path).forward(IDS, all_logits=True)
    assert error_ratio(got, Naive("7", want).forward(IDS)) < 1e-5
    assert error_ratio(Naive("7", WEIGHTS).forward(IDS), Naive("7", want).forward(IDS)) > 1e-3


MATRICES_WEIGHT = tuple(f"{name}.weight" for name in MATRICES)


@pytest.mark.parametrize(("arguments", "alpha"), [((), 32), (("--adapter-scale", 0.5), 2)])
def test_lora_is_merged_as_rwkv_peft_does_it(rwkv: Run, base: Path, arguments: tuple[Any, ...], alpha: float) -> None:
    """Tensors that were trained as a whole replace the model's."""
    adapter = low_rank() | {name: a + 0.1 for name, a in WEIGHTS.items() if ".ln" in name or ".x_" in name}
    file = tiny.write_pth(base.parent / "rwkv-0.pth", adapter, "F32")
    check(converted(rwkv, base, "--adapter", file, *arguments), merge_pairs(WEIGHTS, adapter, alpha))


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("named", [False, True])
def test_pissa_takes_its_start_off(rwkv: Run, base: Path, prefix: str, named: bool) -> None:
    """Its start is found beside the adapter, as RWKV-PEFT leaves it there, or is named."""
    trained, start = low_rank(seed=3), low_rank("init_lora_A", "init_lora_B")
    file = tiny.write_pth(base.parent / "rwkv-0.pth", trained, "F32")
    other = tiny.write_pth(base.parent / ("start.pth" if named else "init_pissa.pth"), start, "F32", prefix)
    order = ["--adapter", other] if named else []
    out = converted(rwkv, base, *order, "--adapter", file)
    for name, value in merge_pairs(WEIGHTS, trained, 4).items():
        if name.endswith(MATRICES_WEIGHT):
            stem = name.removesuffix("weight")
            value = value - start[stem + "init_lora_B"].astype(np.float64) @ start[stem + "init_lora_A"]
            got = Checkpoint(out).tensor(name, value.shape)
            # the start and the trained pair are each rounded to float32
            np.testing.assert_allclose(got.bits, value, atol=1e-6)
    assert "start of PiSSA" in rwkv("info", out).stdout


@pytest.mark.parametrize("word", ["disha", "bone"])
@pytest.mark.parametrize("form", ["rows", "rows with a rest", "blocks"])
def test_disha_is_merged_as_rwkv_peft_does_it(rwkv: Run, base: Path, word: str, form: str) -> None:
    adapter = {}
    for i in range(2):
        for name in MATRICES:
            out, inputs = WEIGHTS[f"blocks.{i}.{name}.weight"].shape
            shape = {"rows": (8, out), "rows with a rest": (7, out), "blocks": (inputs // 8, 8, 8)}[form]
            adapter[f"blocks.{i}.{name}.{word}"] = normal(*shape, seed=i)
    file = tiny.write_safetensors(base.parent / "rwkv-0.safetensors", adapter, "F32")
    check(converted(rwkv, base, "--adapter", file), merge_disha(WEIGHTS, adapter, word))


@pytest.mark.parametrize("form", ["pairs", "rows", "blocks"])
def test_rows_of_later_blocks_are_their_own(rwkv: Run, base: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block need not begin where a block of the adapter does. Quantized matrices are read twice."""
    name = "blocks.1.ffn.key"
    parts = {
        "pairs": {f"{name}.lora_A": normal(4, 48), f"{name}.lora_B": normal(96, 4)},
        "rows": {f"{name}.disha": normal(7, 96)},
        "blocks": {f"{name}.disha": normal(6, 8, 8)},
    }[form]
    file = tiny.write_pth(base.parent / "rwkv-0.pth", parts, "F32")
    whole = [converted(rwkv, base, "--adapter", file, quant=quant).read_bytes() for quant in ("none", "int8")]
    monkeypatch.setattr("rwkv_cli.quant.writer._BLOCK_BYTES", 4 * 48 * 20)
    small = [converted(rwkv, base, "--adapter", file, quant=quant).read_bytes() for quant in ("none", "int8")]
    assert small == whole


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_a_tuned_state_is_merged(rwkv: Run, tmp_path: Path, version: str) -> None:
    weights = tiny.weights(version, layers=2, vocab=256)
    states = {f"blocks.{i}.att.time_state": normal(3, 16, 16, seed=i) for i in range(2)}
    base = tiny.write_pth(tmp_path / "base.pth", weights, "F32")
    file = tiny.write_pth(tmp_path / "state.pth", states, "F32")
    out = converted(rwkv, base, "--adapter", file)
    digest = Checkpoint(out).digest
    got, _ = rwkv_cli.load(out).forward(IDS, all_logits=True)
    assert error_ratio(got, Naive(version, weights | states).forward(IDS)) < 1e-5
    turned = {name: np.ascontiguousarray(a.transpose(0, 2, 1)) for name, a in states.items()}
    for other in (
        tiny.write_safetensors(tmp_path / "a.state", turned, "F32"),
        tiny.write_pth(tmp_path / "a.pth", states, "F32", "model."),
    ):
        assert Checkpoint(converted(rwkv, base, "--adapter", other)).digest == digest
    merged = tiny.write_pth(tmp_path / "merged.pth", weights | states, "F32")
    assert Checkpoint(converted(rwkv, merged)).digest == digest


def web(adapter: tiny.Tensors) -> tiny.Tensors:
    """As web-rwkv's convert_safetensors.py does it."""
    return {
        name.replace("lora_A", "lora.0").replace("lora_B", "lora.1"): array.T if "lora_A" in name else array
        for name, array in adapter.items()
    }


def peft(adapter: tiny.Tensors) -> tiny.Tensors:
    """As PEFT saves an adapter of transformers' RWKV."""
    renamed = {}
    for name, array in adapter.items():
        name = name.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
        renamed[f"base_model.model.rwkv.{name}.weight"] = array
    return renamed


def test_other_programs_name_pairs_otherwise(rwkv: Run, base: Path) -> None:
    plain = tiny.write_pth(base.parent / "plain.pth", low_rank(), "F32")
    want = Checkpoint(converted(rwkv, base, "--adapter", plain)).digest
    turned = {name: np.ascontiguousarray(array) for name, array in web(low_rank()).items()}
    other = tiny.write_safetensors(base.parent / "lora.st", turned, "F32")
    assert Checkpoint(converted(rwkv, base, "--adapter", other)).digest == want
    folder = base.parent / "lora"
    folder.mkdir()
    tiny.write_safetensors(folder / "adapter_model.safetensors", peft(low_rank()), "F32")
    (folder / "adapter_config.json").write_text('{"lora_alpha": 32, "r": 4, "init_lora_weights": true}')
    for path in (folder, folder / "adapter_model.safetensors"):
        assert Checkpoint(converted(rwkv, base, "--adapter", path)).digest == want


def test_the_scale_is_told_by_files_beside_the_adapter(rwkv: Run, base: Path) -> None:
    folder = base.parent / "trained"
    folder.mkdir()
    file = tiny.write_pth(folder / "rwkv-0.pth", low_rank(), "F32")
    result = rwkv("convert", base, "--adapter", file, "--dry-run")
    assert result.exit_code == 0
    assert "adapter          rwkv-0.pth (LoRA, alpha 32)\n" in result.stdout
    assert f"Nothing tells the alpha of {file}: RWKV-PEFT's default, 32, was taken" in result.stderr
    assert "base+rwkv-0.int8.safetensors was not written" in result.stderr
    settings = {"n_layer": 2, "lora_config": {"lora_load": "", "lora_r": 4, "lora_alpha": 72, "lora_dropout": 0.01}}
    (folder / "train_log.txt").write_text(f"NEW RUN 2025\n{settings}\n0 2.1 8.2\n")
    result = rwkv("convert", base, "--adapter", file)
    assert "Nothing tells" not in result.stderr
    told = base.parent / "base+rwkv-0.int8.safetensors"
    assert "rwkv-0.pth (LoRA, alpha 72)" in rwkv("info", told).stdout
    assert json.loads(rwkv("info", told, "--json").stdout)["adapters"] == ["rwkv-0.pth (LoRA, alpha 72)"]
    given = converted(rwkv, base, "--adapter", file, "--adapter-scale", 18)
    assert Checkpoint(given).digest == Checkpoint(told).digest
    assert "rwkv-0.pth (LoRA, scale 18)" in rwkv("info", given).stdout


def test_several_adapters_are_merged_in_turn(rwkv: Run, base: Path) -> None:
    first, second = low_rank(), {"blocks.0.att.key.disha": normal(8, 48)}
    files = [tiny.write_pth(base.parent / f"{i}.pth", adapter, "F32") for i, adapter in enumerate((first, second))]
    out = converted(rwkv, base, "--adapter", files[0], "--adapter", files[1])
    merged = {name: value.astype(np.float32) for name, value in merge_pairs(WEIGHTS, first, 32).items()}
    check(out, merge_disha(merged, second, "disha"))


def test_a_base_without_an_adapter_is_as_before(rwkv: Run, base: Path) -> None:
    out = converted(rwkv, base)
    assert "\nadapter" not in rwkv("info", out).stdout
    assert json.loads(rwkv("info", out, "--json").stdout)["adapters"] == []


KEY = "blocks.0.att.key"
PAIR = {f"{KEY}.lora_A": normal(4, 48), f"{KEY}.lora_B": normal(48, 4)}


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        (PAIR | {"blocks.7.att.key.lora_A": normal(4, 48)}, r"tensor blocks\.7\.att\.key\.lora_A has no place in the"),
        (PAIR | {f"x.{i}": normal(2) for i in range(7)}, r"x\.0, x\.1, x\.2, x\.3, x\.4 and 2 more has no place"),
        ({f"{KEY}.lora_A": normal(4, 48)}, r"att\.key\.lora_A does not make up one change of blocks\.0\.att\.key\.w"),
        (PAIR | {f"{KEY}.disha": normal(4, 48)}, r"disha, .*lora_A, .*lora_B does not make up one change of"),
        ({f"{KEY}.lora_A": normal(4, 40), f"{KEY}.lora_B": normal(48, 4)},
         r"lora_A and .*lora_B has shape \[4, 40\] and \[48, 4\], which does not fit .*key\.weight \[48, 48\]"),
        ({f"{KEY}.lora_A": normal(0, 48), f"{KEY}.lora_B": normal(48, 0)}, r"has shape \[0, 48\] and \[48, 0\], which"),
        ({f"{KEY}.disha": normal(8, 40)}, r"disha has shape \[8, 40\], which does not fit"),
        ({f"{KEY}.bone": normal(6, 8, 7)}, r"bone has shape \[6, 8, 7\], which does not fit"),
        ({f"{KEY}.disha": normal(5, 8, 8)}, r"disha has shape \[5, 8, 8\], which does not fit"),
        ({"blocks.0.ln1.lora_A": normal(4, 48)}, r"tensor blocks\.0\.ln1\.lora_A has no place in the model"),
        (PAIR | {"blocks.0.ln1.weight": normal(40)}, r"ln1\.weight has shape \[40\], but the model's is \[48\]"),
        ({"blocks.0.att.time_state": normal(3, 8, 8)}, r"has shape \[3, 8, 8\], but the model's is \[3, 16, 16\]"),
        ({"blocks.9.att.time_state": normal(3, 16, 16)}, r"blocks\.9\.att\.time_state has no place in the model"),
        ({"emb.weight": WEIGHTS["emb.weight"]}, "not an adapter: it holds no lora_A, disha, bone or time_state"),
        ({f"{KEY}.lora_A": normal(4, 48), f"{KEY}.lora_B": np.full((48, 4), np.inf, np.float32)},
         r"tensor blocks\.0\.att\.key\.lora_B holds NaN or infinity"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_names_the_tensor(rwkv: Run, base: Path, adapter: tiny.Tensors, says: str) -> None:
    file = tiny.write_pth(base.parent / "adapter.pth", adapter, "F32")
    result = rwkv("convert", base, "--adapter", file, "--adapter-scale", 1) if "lora" in says else None
    refused(result or rwkv("convert", base, "--adapter", file), file, says)
    assert sorted(path.name for path in base.parent.iterdir()) == ["adapter.pth", "base.pth"]


def test_a_state_has_no_place_in_rwkv_4(rwkv: Run, tmp_path: Path) -> None:
    base = tiny.write_pth(tmp_path / "base.pth", tiny.weights("4", layers=1), "F32")
    file = tiny.write_pth(tmp_path / "state.pth", {"blocks.0.att.time_state": normal(3, 16, 16)}, "F32")
    refused(rwkv("convert", base, "--adapter", file), file, r"blocks\.0\.att\.time_state has no place in the model")


def test_pissa_is_not_merged_by_halves(rwkv: Run, base: Path) -> None:
    start = tiny.write_pth(base.parent / "start.pth", low_rank("init_lora_A", "init_lora_B"), "F32")
    says = (
        r"the start of a PiSSA adapter; give it with its one trained file: --adapter TRAINED\.pth --adapter start\.pth"
    )
    refused(rwkv("convert", base, "--adapter", start), start, says)
    trained = tiny.write_pth(base.parent / "trained.pth", low_rank(), "F32")
    both = ("--adapter", trained, "--adapter", start)
    refused(rwkv("convert", base, *both, "--adapter-scale", 2), start, "has no scale; leave --adapter-scale out")
    refused(rwkv("convert", base, *both, "--adapter", tiny.write_pth(base.parent / "x", low_rank())), start, says)


def test_only_lora_has_a_scale(rwkv: Run, base: Path) -> None:
    disha = tiny.write_pth(base.parent / "disha.pth", {f"{KEY}.disha": normal(8, 48)}, "F32")
    lora = tiny.write_pth(base.parent / "lora.pth", low_rank(), "F32")
    says = "needs a LoRA adapter and a finite number"
    refused(rwkv("convert", base, "--adapter", disha, "--adapter-scale", 2), "--adapter-scale 2", says)
    refused(rwkv("convert", base, "--adapter", lora, "--adapter-scale", "nan"), "--adapter-scale nan", says)
    refused(rwkv("convert", base, "--adapter-scale", 2), "--adapter-scale 2", says)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("[", "not a readable JSON object with lora_alpha; download it again"),
        ("[1]", "not a readable JSON object with lora_alpha; download it again"),
        ('{"r": 4}', "not a readable JSON object with lora_alpha; download it again"),
        ('{"lora_alpha": 1' + "0" * 400 + "}", "not a readable JSON object with lora_alpha; download it again"),
        ('{"lora_alpha": "8"}', "its lora_alpha is not supported; merge the adapter with PEFT"),
        ('{"lora_alpha": 8, "use_rslora": true}', "its use_rslora is not supported; merge the adapter with PEFT"),
        ('{"lora_alpha": 8, "alpha_pattern": {"key": 4}}', "its alpha_pattern is not supported"),
        ('{"lora_alpha": 8, "init_lora_weights": "pissa_niter_4"}', "its init_lora_weights is not supported"),
    ],
)
def test_settings_of_peft_that_change_the_sum_are_refused(rwkv: Run, base: Path, settings: str, says: str) -> None:
    file = tiny.write_safetensors(base.parent / "adapter_model.safetensors", peft(low_rank()), "F32")
    (base.parent / "adapter_config.json").write_text(settings)
    refused(rwkv("convert", base, "--adapter", file), base.parent / "adapter_config.json", says)


def test_a_sum_that_overflows_is_named(rwkv: Run, base: Path) -> None:
    adapter = {name: array * np.float32(1e30) for name, array in low_rank().items()}
    file = tiny.write_pth(base.parent / "a.pth", adapter, "F32")
    refused(rwkv("convert", base, "--adapter", file), "base.pth: tensor .* holds NaN or infinity")


def test_an_adapter_is_not_written_over(rwkv: Run, base: Path) -> None:
    file = tiny.write_pth(base.parent / "rwkv-0.pth", low_rank(), "F32")
    refused(rwkv("convert", base, file, "--adapter", file, "--force"), file, "is the source itself; give another DST")


@pytest.mark.parametrize("name", ["bone", "disha", "init_pissa"])
def test_adapters_that_rwkv_peft_wrote(rwkv: Run, tmp_path: Path, shared: Path, name: str) -> None:
    file = shared / "cases" / "peft-adapters" / f"{name}.pth"
    if not file.is_file():
        pytest.skip("no adapters of RWKV-PEFT; the tests above write such files")
    refused(rwkv("convert", file, tmp_path / "out"), file, r"adapter; name its base model first, as in `rwkv convert")
    weights = tiny.weights("7", layers=1, width=64, vocab=256)
    base = tiny.write_pth(tmp_path / "base.pth", weights, "F32")
    if name == "init_pissa":
        refused(rwkv("convert", base, "--adapter", file), file, "the start of a PiSSA adapter")
    else:
        converted(rwkv, base, "--adapter", file)
