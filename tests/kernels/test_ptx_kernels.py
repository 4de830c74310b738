"""Every kernel as PTX in the interpreter, which checks memory, races and barriers (docs/cuda.md).

Here these are small tests that go through each kernel's loops. `RWKV_TEST_PTX=9.0 pytest tests/kernels -k cuda` runs
all of them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from extras import needs
from lab import INTERPRETED

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
    "or every_cuda_kernel"
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


@pytest.mark.skipif(not INTERPRETED, reason="RWKV_TEST_PTX is not set: these kernels run in numba's simulator")
def test_every_cuda_kernel_was_executed() -> None:
    """It comes after the tests of kernels, as their names are in order."""
    from ptx import gpu

    for name in re.findall(r"@kernel\(.*\)\n *def (\w+)", "".join(path.read_text() for path in SOURCES)):
        assert any(each.split()[0] == name for each in gpu.LAUNCHED), f"{name} was not executed"
