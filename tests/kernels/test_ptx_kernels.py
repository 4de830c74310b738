"""Every kernel as PTX in the interpreter, which checks memory, races and barriers (docs/cuda.md).

Here these are small tests that go through each kernel's loops. `RWKV_TEST_PTX=9.0 pytest tests/kernels -k cuda` runs
all of them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from extras import needs
from lab import INTERPRETED, Lab, normal
from ptx.errors import KernelError
from ptx.parse import parse

from rwkv_cli.kernels.program import LayerNorm, Norm

HERE = Path(__file__).parent
SOURCES = sorted((HERE.parents[1] / "kernels" / "cuda").rglob("*.py"))
PRODUCTS = (
    "quantized_linear and (2-33-70-tile-0 or 33-210-300-tile-0 or 33-210-300-tile5-0 or 33-210-300-columns-0 "
    "or 33-210-300-columns4-0 or 65-210-300-tile)"
)
LEVELS = "norm_and_shift and lengths1 or levels_are_put and (lengths0 or lengths3)"
ONE_TOKEN = "quantized_linear and 1-19-2240 or long_row and not BF16"
OTHERS = (
    "wkv and (64-True or 24-True) or wkv4 or scores or layer_norm and 4096 or token_shift and (4096 or 600 or False) "
    "or round_to or gate or float_linear and (25-17 or 6-33) and not BF16 or quantized_embedding or limits "
    "or every_cuda_kernel or in_a_cuda_kernel"
)


@pytest.mark.parametrize(
    ("capability", "selected"),
    [
        ("9.0", f"{PRODUCTS} or {LEVELS} or {ONE_TOKEN} or {OTHERS}"),
        ("7.5", f"{PRODUCTS} or {LEVELS}"),  # before Ampere a warp's instructions are others
    ],
)
def test_no_kernel_has_a_mistake(capability: str, selected: str) -> None:
    needs("numba_cuda", "dev")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", HERE, "-k", f"cuda and ({selected})"],
        capture_output=True, text=True, env=os.environ | {"RWKV_TEST_PTX": capability, "NUMBA_ENABLE_CUDASIM": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


interpreted = pytest.mark.skipif(not INTERPRETED, reason="RWKV_TEST_PTX is not set: kernels run in numba's simulator")


@interpreted
@pytest.mark.parametrize(
    ("left_out", "check"),
    [
        (r"bar\.sync\s+0;", "racecheck"),
        (r"griddepcontrol\.wait;", "griddepcontrol"),
        (r"st\.shared[^;]*;", "initcheck"),
    ],
)
def test_a_mistake_in_a_cuda_kernel_is_found(left_out: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm whose PTX lacks some instructions."""
    from ptx import gpu

    if check == "griddepcontrol" and float(os.environ["RWKV_TEST_PTX"]) < 9:
        pytest.skip("before Hopper no launch waits")
    x, lab = normal(2, 129), Lab("cuda")
    ones = lab.vector(np.ones(129))
    out = lab.ops.add(LayerNorm(lab.matrix(x), Norm(ones, ones, 1e-5)))
    assert lab.run(out).shape == x.shape
    monkeypatch.setattr(gpu, "_compiled", gpu._compiled.__wrapped__)
    monkeypatch.setattr(gpu, "parse", lambda text: parse(re.sub(left_out, "", text)))
    with pytest.raises(KernelError, match=rf"^{check}: layer_norm ×1: `"):
        lab.run(out)


@interpreted
def test_every_cuda_kernel_was_executed() -> None:
    """This test comes after the tests of kernels, as their names are in order."""
    from ptx import gpu

    for name in re.findall(r"@kernel\(.*\)\n *def (\w+)", "".join(path.read_text() for path in SOURCES)):
        assert any(each.split()[0] == name for each in gpu.LAUNCHED), f"{name} was not executed"
