"""The path for CPUs without AVX-512 VNNI, compiled and run here: the same tests, and the same bits."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FEATURES = {"haswell": "+avx2,+fma,+f16c,+bmi,+bmi2"}
CPUS = ["x86-64", "haswell"] if platform.machine() in ("x86_64", "AMD64") else ["generic"]

BITS = """
import hashlib, numpy as np, lab
for T, N, K in ((1, 40, 70), (7, 300, 192), (13, 256, 512)):
    w, x = lab.normal(N, K), lab.normal(T, K)
    for layout in ("tile", "columns", "tile4", "columns4", "tile5", "columns5", "tile6", "columns6"):
        q = lab.quantize(w, layout)
        y = lab.linear(x, q)
        print(hashlib.sha256(q.values.tobytes() + q.scales.tobytes() + y.tobytes()).hexdigest())
"""


def run(cpu: str, *command: str) -> str:
    """Output of a Python command with kernels compiled for `cpu` ("": this one)."""
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    if cpu:
        env |= {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": FEATURES.get(cpu, "")}
    done = subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, cwd=TESTS.parents[1], check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("cpu", CPUS)
def test_kernels_on_a_lesser_cpu(cpu: str) -> None:
    assert run(cpu, "-P", "-c", "from rwkv_cli.kernels.cpu import rounding; print(rounding.VNNI)").strip() == "False"
    listed = run(cpu, "-P", "-m", "rwkv_cli", "info", "--devices")
    assert f"{'AVX2' if cpu == 'haswell' else 'portable'} kernels" in listed
    tests = [str(TESTS / name) for name in ("test_kernels.py", "test_contract.py", "test_contract_products.py")]
    assert " passed" in run(cpu, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not cuda", *tests)


@pytest.mark.parametrize("cpu", CPUS[-1:])
def test_the_same_bits_on_every_cpu_with_fused_multiply_add(cpu: str) -> None:
    """Integer sums are exact and float steps come in the same order, so an int8 matmul does not depend on the CPU."""
    assert run(cpu, "-P", "-c", BITS) == run("", "-P", "-c", BITS)


ARM = """
import platform, re, numba, llvmlite.binding as llvm
platform.machine = lambda: "aarch64"
from rwkv_cli.kernels.cpu import columns as sparse
from rwkv_cli.kernels.cpu import wkv
from rwkv_cli.kernels.cpu.llvm.int8_dot import LevelGroup, RowGroup, WeightGroup, groups_step
from rwkv_cli.kernels.cpu.llvm.recurrence import DeltaStep
llvm.initialize_all_targets(); llvm.initialize_all_asmprinters()
product, rows, delta, f32 = groups_step(1, 1, False, 15, True), sparse._one_wide, wkv._delta64, numba.float32
def tile(x, y): product(WeightGroup(x, y, x + 1, y, f32(1)), LevelGroup(x + 2, y, x + 3, x + 4, y), y, x + 5, y)
def columns(x, y): rows(RowGroup(x, y, x + 1, x + 2, y, y, x + 3, x + 4, y, x + 5, y), f32(1))
def recurrence(x, y): delta(DeltaStep(x, y, x + 1, x + 2, x + 3, x + 4, x + 5, x + 6, y))
machine = llvm.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(cpu="neoverse-n1", opt=3)
for function in (tile, columns, recurrence):
    code = numba.cfunc("void(int64, int64)", error_model="numpy")(function).inspect_llvm()
    code = re.sub('target triple = ".*"', 'target triple = "aarch64-unknown-linux-gnu"', code)
    code = re.sub('target datalayout = ".*"|"target-(cpu|features)"="[^"]*"', "", code)
    print(function.__name__, *re.findall(r"^\\t(\\w+)\\tv", machine.emit_assembly(llvm.parse_assembly(code)), re.M))
"""


@pytest.mark.skipif(CPUS[0] != "x86-64", reason="an Arm machine runs this path itself, in the tests above")
def test_arm_gets_vector_instructions() -> None:
    """The portable path's inner steps, compiled here for AArch64."""
    lines = run("x86-64", "-P", "-c", ARM).splitlines()
    made = {name: instructions for name, *instructions in map(str.split, lines)}
    assert made["tile"].count("smlal") + made["tile"].count("smull") >= 64
    assert made["columns"].count("smlal") >= 8
    assert made["recurrence"].count("fmla") >= 32
