"""A live comparison with the reference package, where it and torch are installed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_reference
import tiny
from naive import error_ratio, log_softmax

import rwkv_cli

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="torch is not installed (make test EXTRAS=dev,reference); goldens.json holds the same comparison",
)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("version", sorted({*tiny.VERSIONS, "5.0r2"} - run_reference.DEMOS.keys()))
def test_the_reference_gives_the_same(tmp_path: Path, rwkv: Any, version: str, dtype: str) -> None:
    sizes = {"layers": 3, "width": 192, "head": 64, "vocab": 300, "ffn": 224, "seed": 7}
    tiny.write_pth(tmp_path / "model.pth", tiny.weights(version, **sizes), dtype)
    ids = [0, *np.random.default_rng(4).integers(0, 300, 60).tolist()]
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    script = Path(__file__).parents[1] / "run_reference.py"
    command = [sys.executable, script, version, tmp_path / "model.pth", tmp_path / "ids.json", tmp_path / "out.npy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    want = np.load(tmp_path / "out.npy")
    assert rwkv("convert", tmp_path / "model.pth", tmp_path / "model", "--quant", "none").exit_code == 0
    got, _ = rwkv_cli.load(tmp_path / "model").forward(ids, all_logits=True)
    # both round LN0(emb) to F16 or BF16 before v7: where their float32 differs, one in 50,000 rounds the other way
    assert error_ratio(got, want) < (1e-5 if dtype == "F32" or version == "7" else 1e-4)
    targets = np.array(ids[1:])
    nll = [-log_softmax(a[:-1].astype(np.float64))[np.arange(len(targets)), targets].sum() for a in (got, want)]
    np.testing.assert_allclose(nll[0], nll[1], rtol=1e-5)
