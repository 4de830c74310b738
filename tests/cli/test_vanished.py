"""A model's file that is cut short while it runs ends the command with a sentence."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from rwkv_cli.engine.conversion import Conversion
from rwkv_cli.quant import Checkpoint


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="a mapped file cannot be cut there; nothing else is needed")
def test_a_model_that_is_cut_short_while_it_runs_is_named(byte_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "modèle.safetensors"
    path.write_bytes(byte_model.read_bytes())
    command = [sys.executable, "-m", "rwkv_cli", "generate", "a", "-m", str(path), "-n", "9999999", "--ignore-eos"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None
    running.stdout.read(300)  # the text is coming
    os.truncate(path, 0)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 1
    says = f"Error: {path}: was cut short or overwritten while it ran; convert it again, then run it again"
    assert stderr.decode().splitlines()[-1] == says


def test_a_conversion_never_overwrites_in_place(tmp_path: Path) -> None:
    one, other = (tiny.write_pth(tmp_path / f"{i}.pth", tiny.weights("7", vocab=256, seed=i)) for i in (0, 1))
    path = tmp_path / "model"
    Conversion.of(one, "none").write(path, overwrite=False)
    running = Checkpoint(path)
    before = np.array(running.array("head.weight"))
    Conversion.of(other, "none").write(path, overwrite=True)
    np.testing.assert_array_equal(running.array("head.weight"), before)
    assert (Checkpoint(path).array("head.weight") != before).any()
