"""Tuned initial states: those in a checkpoint, files of them, and what is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner, Result
from naive import Naive, error_ratio
from states import read, tuned_tensors
from tiny import wrong

import rwkv_cli
from rwkv_cli.main import cli
from rwkv_cli.models.tuned import read_tuned_state

Run = Callable[..., Result]
Convert = Callable[..., Path]
TUNED_VERSIONS = tiny.VERSIONS[1:]


@pytest.mark.parametrize("version", TUNED_VERSIONS)
@pytest.mark.parametrize(("form", "dtype"), [("pth", "BF16"), ("pth", "F16"), ("safetensors", "F32")])
def test_a_tuned_state_is_the_one_merged_into_the_checkpoint(
    converted: Convert, version: str, form: str, dtype: str, tmp_path: Path
) -> None:
    tensors = tuned_tensors(version)
    write = tiny.write_pth if form == "pth" else tiny.write_safetensors
    write(tmp_path / "tuned", tensors, dtype)
    merged = tiny.weights(version) | tiny.rounded(tensors, dtype)
    source = tiny.write_pth(tmp_path / "merged.pth", merged, "F32")
    assert CliRunner().invoke(cli, ["convert", str(source), str(tmp_path / "merged")]).exit_code == 0
    want, _ = rwkv_cli.load(tmp_path / "merged").forward([5, 6, 7])
    model = rwkv_cli.load(converted(version))
    state = read_tuned_state(tmp_path / "tuned", model)
    assert state.digest == model.digest
    got, _ = model.forward([5, 6, 7], state)
    np.testing.assert_array_equal(got, want)
    assert not np.array_equal(got, model.forward([5, 6, 7])[0])


@pytest.mark.parametrize("version", TUNED_VERSIONS)
def test_a_tuned_state_has_values_by_rows_in_the_file(converted: Convert, version: str, tmp_path: Path) -> None:
    tensors = tuned_tensors(version)
    model = rwkv_cli.load(converted(version, "none"))
    state = read_tuned_state(tiny.write_pth(tmp_path / "tuned", tensors, "F32"), model)
    got, _ = model.forward([5, 6, 7], state, all_logits=True)
    assert error_ratio(got, Naive(version, tiny.weights(version) | tensors).forward([5, 6, 7])) < 1e-5


def test_generate_starts_from_a_tuned_state(generate: Run, tmp_path: Path) -> None:
    tiny.write_pth(tmp_path / "tuned.pth", tuned_tensors())
    first = generate("Once", "-n", 30)
    second = generate("Once", "-n", 30, "--state", tmp_path / "tuned.pth")
    assert second.exit_code == 0
    assert second.stdout != first.stdout


@pytest.mark.parametrize(
    ("version", "change", "says"),
    [
        ("4", {}, "RWKV-4 has no initial state to tune; RWKV-5 to RWKV-7 have"),
        ("7", {"layers": 2}, "tensor blocks.2.att.time_state is missing; a tuned initial state for this model holds"),
        ("7", {"layers": 4}, "tensor blocks.3.att.time_state is too much; a tuned initial state for this model holds"),
        ("6", {"heads": 2}, "tensor blocks.0.att.time_state has shape [2, 16, 16], the model's is [3, 16, 16]; it is"),
        ("5.2", {"size": 8}, "tensor blocks.0.att.time_state has shape [3, 8, 8], the model's is [3, 16, 16]; it is"),
        ("7", {"emb.weight": np.zeros((4, 4), np.float32)}, "tensor emb.weight is too much; a tuned initial state"),
        ("7", {"blocks.1.att.time_state": np.full((3, 16, 16), np.nan, np.float32)},
         "tensor blocks.1.att.time_state holds NaN or infinity; the file is damaged, download it again"),
        ("7", {"blocks.2.att.time_state": np.full((3, 16, 16), np.inf, np.float32)},
         "tensor blocks.2.att.time_state holds NaN or infinity; the file is damaged, download it again"),
    ],
)  # fmt: skip
def test_what_is_no_tuned_state_of_the_model_is_refused(
    generate: Run, converted: Convert, tmp_path: Path, version: str, change: dict[str, Any], says: str
) -> None:
    sizes = {name: value for name, value in change.items() if isinstance(value, int)}
    added = {name: value for name, value in change.items() if name not in sizes}
    path = tiny.write_pth(tmp_path / "tuned.pth", tuned_tensors(version, **sizes) | added, "F32")
    wrong(generate("a", "--state", path, model=converted(version, vocab=256)), f"{path}: {says}")


def test_files_of_another_kind_are_sent_to_their_option(generate: Run, byte_model: Path, tmp_path: Path) -> None:
    read(byte_model).save(tmp_path / "saved")
    generate("Once", "-n", 1, "--prompt-cache", tmp_path / "cache")
    tiny.write_pth(tmp_path / "tuned.pth", tuned_tensors())
    tiny.write_safetensors(tmp_path / "tuned.safetensors", tuned_tensors())
    for name, option, says in [
        ("saved", "--state", "a saved state, not a tuned initial one; rwkv generate --load-state takes it"),
        ("cache", "--load-state", "a prompt cache, not a saved state; give it with --prompt-cache"),
        ("tuned.pth", "--load-state", "a tuned initial state, not a saved one; give it with --state"),
        ("tuned.safetensors", "--load-state", "a tuned initial state, not a saved one; give it with --state"),
    ]:
        wrong(generate("a", option, tmp_path / name), f"{tmp_path / name}: {says}")
    wrong(generate("a", "--state", byte_model), f"{byte_model}: already converted; run it with -m")
    source = byte_model.with_suffix(".pth")
    wrong(generate("a", "--state", source), f"{source}: not a tuned initial state, since it holds no blocks.0")
    (tmp_path / "junk").write_bytes(b"junk" * 99)
    wrong(generate("a", "--state", tmp_path / "junk"), f"{tmp_path}/junk: neither a torch .pth nor a safetensors or")
