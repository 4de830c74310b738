"""Files of web-rwkv and ai00: a `.st` is the same model as its `.pth`, and a `.state` the same tuned state."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import Result

import rwkv_cli
from rwkv_cli.models import naming
from rwkv_cli.models.tuned import read_tuned_state
from rwkv_cli.quant import Checkpoint, open_source

Run = Callable[..., Result]


def web(weights: tiny.Tensors) -> tiny.Tensors:
    """As web-rwkv's convert_safetensors.py does it."""
    renamed = {}
    for name, array in weights.items():
        new = name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix")
        if re.search(r"(time_mix_w[12]|time_decay_w[12]|\.[wavg][12]|time_state)$", new):
            array = np.ascontiguousarray(np.swapaxes(array, -1, -2))
        renamed[new] = array
    return renamed


def states() -> tiny.Tensors:
    rng = np.random.default_rng(3)
    return {f"blocks.{i}.att.time_state": rng.standard_normal((3, 16, 16)).astype(np.float32) for i in range(3)}


PLAIN = [(version, False) for version in tiny.VERSIONS]
TUNED = [(version, True) for version in tiny.VERSIONS if version != "4"]  # RWKV-4 has no state to tune


@pytest.mark.parametrize(("version", "tuned"), PLAIN + TUNED)
def test_a_st_file_is_the_same_model(rwkv: Run, tmp_path: Path, version: str, tuned: bool) -> None:
    weights = tiny.weights(version) | (states() if tuned else {})
    tiny.write_pth(tmp_path / "a.pth", weights, "F16")
    tiny.write_safetensors(tmp_path / "a.st", web(weights), "F16")
    digests = set()
    for name in ("a.pth", "a.st"):
        result = rwkv("convert", tmp_path / name, tmp_path / "out", "--quant", "none", "--force")
        assert result.exit_code == 0, result.stderr
        digests.add(Checkpoint(tmp_path / "out").digest)
    assert len(digests) == 1


def test_low_ranks_as_wide_as_the_model_are_turned_with_the_others(tmp_path: Path) -> None:
    """A square factor does not show how it lies."""
    weights = tiny.weights("7", width=24, head=8)  # the rank of g is 24, too
    got = naming.official(open_source(tiny.write_safetensors(tmp_path / "a", web(weights), "F32")))
    for name, array in weights.items():
        np.testing.assert_array_equal(got[name].float32(), array)


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_a_state_file_is_turned(converted: Callable[..., Path], tmp_path: Path, version: str) -> None:
    tensors = states()
    model = rwkv_cli.load(converted(version))
    want = read_tuned_state(tiny.write_pth(tmp_path / "a.pth", tensors, "F16"), model).wkv
    for name in ("a.state", "a.st"):
        tiny.write_safetensors(tmp_path / name, web(tensors), "F16")
        np.testing.assert_array_equal(read_tuned_state(tmp_path / name, model).wkv, want)
    # a torch file has the official order, whatever it is called
    tiny.write_pth(tmp_path / "torch.state", tensors, "F16")
    np.testing.assert_array_equal(read_tuned_state(tmp_path / "torch.state", model).wkv, want)


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_st_files_that_the_program_wrote(shared: Path, version: str) -> None:
    folder = shared / "cases" / "st-file"
    if not folder.is_dir():
        pytest.skip("no .st files of web-rwkv's script; the tests above write such files")
    got, want = (naming.official(open_source(folder / f"v{version}.{ending}")) for ending in ("st", "pth"))
    assert set(got) == set(want)
    for name, tensor in want.items():
        half = tensor.float32().astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(got[name].float32(), half)


@pytest.mark.parametrize("version", ["6", "7"])
def test_states_that_ai00_wrote(rwkv: Run, tmp_path: Path, shared: Path, version: str) -> None:
    folder = shared / "cases" / "ai00-state"
    if not folder.is_dir():
        pytest.skip("no .state files of ai00's script; the tests above write such files")
    assert rwkv("convert", folder / f"v{version}.pth", tmp_path / "out").exit_code == 0
    model = rwkv_cli.load(tmp_path / "out")
    got, want = (read_tuned_state(folder / f"v{version}{end}", model).wkv for end in (".state", "-state.pth"))
    np.testing.assert_allclose(got, want, atol=1e-3)
