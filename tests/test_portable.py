"""The path for CPUs without AVX-512 VNNI, compiled and run here: the same tests, and the same bits."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CPUS = ["x86-64", "haswell"] if platform.machine() in ("x86_64", "AMD64") else ["generic"]

BITS = """
import hashlib, numpy as np
from rwkv_cli.kernels import cpu
from rwkv_cli.kernels.quantize import quantize_rows
from rwkv_cli.quant.int8 import quantize
rng = np.random.default_rng(0)
for T, N, K in ((1, 40, 70), (7, 300, 192), (13, 256, 512)):
    w, x = (rng.standard_normal(s).astype(np.float32) for s in ((N, K), (T, K)))
    for layout in ("tile", "columns"):
        q = quantize(w, layout, quantize_rows)
        y = cpu.linear(x, cpu.int8_weight(layout, q.shape, q.values, q.scales, q.unit))
        print(hashlib.sha256(q.values.tobytes() + q.scales.tobytes() + y.tobytes()).hexdigest())
"""


def run(cpu: str, *command: str) -> str:
    """Output of a Python command with kernels compiled for `cpu` ("": this one)."""
    env = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""} if cpu else dict(os.environ)
    done = subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, cwd=TESTS.parent, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("cpu", CPUS)
def test_kernels_on_a_lesser_cpu(cpu: str) -> None:
    assert run(cpu, "-P", "-c", "from rwkv_cli.kernels import matmul; print(matmul.VNNI)").strip() == "False"
    assert " passed" in run(cpu, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "test_kernels.py"))


@pytest.mark.parametrize("cpu", CPUS[-1:])
def test_the_same_bits_on_every_cpu_with_fused_multiply_add(cpu: str) -> None:
    """Integer sums are exact and float steps come in the same order, so an int8 matmul does not depend on the CPU."""
    assert run(cpu, "-P", "-c", BITS) == run("", "-P", "-c", BITS)
