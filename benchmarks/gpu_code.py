"""Counts what every CUDA kernel is compiled to, without a GPU: registers, blocks a multiprocessor, its hot loop.

    pip install nvidia-cuda-nvdisasm
    python benchmarks/gpu_code.py 9.0            # or another compute capability

The hot loop is the innermost loop that multiplies most. Its instructions are those of a warp in one round. Its cycles
are the least that a warp alone takes for them: the compiler writes into each instruction how long the next one waits
for it (Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", arXiv 1804.06826). What a warp
waits for memory or a shuffle comes on top.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

COMPILE = Path(__file__).resolve().parents[1] / "tests" / "kernels" / "compile_cuda.py"
KINDS = {
    "mma": ("IMMA", "HMMA"), "dp4a": ("IDP",), "fma": ("FFMA", "FMUL", "FADD", "DFMA", "DADD"),
    "load": ("LDG", "LD"), "shared": ("LDS", "STS", "LDSM"), "shuffle": ("SHFL",),
}  # fmt: skip
REGISTERS, WARPS, SHARED = 1 << 16, 64, 228 << 10
"""What a multiprocessor of compute capability 9.0 has. The shared memory of a block has the driver's in it."""
_INSTRUCTION = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9_.]+)(.*)")
_TARGET = re.compile(r"(?:@!?U?P\d\s+BRA|BRA\.U) .*`\((\S+?)\)")
"""A loop ends with a jump on a condition. Code that is away from it, for lanes apart, jumps back without one."""
_SECOND_HALF = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_WAIT_BIT = 41
"""The lowest of four bits, in the second half of an instruction's 16 bytes, that say how long the next one waits."""


class Loop(NamedTuple):
    """A loop: the addresses of its first and last instruction, how many of each kind it has, and their cycles."""

    first: int
    last: int
    counts: Counter[str]

    @property
    def work(self) -> tuple[float, ...]:
        """Its products of tensor cores and of integers, and its share of products of floats. The hot loop has most."""
        return self.counts["mma"], self.counts["dp4a"], self.counts["fma"] / max(self.counts["all"], 1)


def disassembler() -> str:
    """The path of nvdisasm: of CUDA's toolkit, or of its wheel."""
    found = shutil.which("nvdisasm") or next(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm"), None)
    if found is None:
        raise SystemExit("nvdisasm is not there: pip install nvidia-cuda-nvdisasm")
    Path(found).chmod(0o755)
    return str(found)


def loops(text: str) -> list[Loop]:
    """The innermost loops of one function's machine code."""
    labels: dict[str, int] = {}
    code: dict[int, str] = {}
    waits: Counter[int] = Counter()
    jumps: list[tuple[int, str]] = []
    waiting: list[str] = []
    for line in text.splitlines():
        if line.startswith(".L"):
            waiting.append(line.rstrip(":"))
        elif found := _INSTRUCTION.search(line):
            at = int(found[1], 16)
            labels |= dict.fromkeys(waiting, at)
            waiting.clear()
            code[at] = found[2]
            if target := _TARGET.search(line):
                jumps.append((at, target[1]))
        elif half := _SECOND_HALF.search(line):
            waits[at] = int(half[1], 16) >> _WAIT_BIT & 15
    spans = {(labels[to], at) for at, to in jumps if labels.get(to, at) < at}
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [
        Loop(*span, _counts((op, waits[at]) for at, op in code.items() if span[0] <= at <= span[1])) for span in inner
    ]


def _counts(operations: Any) -> Counter[str]:
    """How many instructions there are in all, how many cycles they take, and how many there are of each kind."""
    counts: Counter[str] = Counter()
    for operation, cycles in operations:
        base = operation.split(".")[0]
        counts["all"] += 1
        counts["cycles"] += cycles
        counts.update(kind for kind, bases in KINDS.items() if base in bases)
    return counts


def blocks(facts: dict[str, Any]) -> int:
    """Blocks that a multiprocessor holds, by threads, registers and shared memory."""
    warps = -(-facts["threads"] // 32)
    registers = -(-facts["registers"] // 8) * 8 * 32 * warps
    return min(32, WARPS // warps, REGISTERS // registers, SHARED // max(facts["shared"], 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("capability", nargs="?", default="9.0")
    capability, nvdisasm = parser.parse_args().capability, disassembler()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "0"}
        command = [sys.executable, str(COMPILE), capability, "--code", folder]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        print("| kernel | registers | shared | blocks | warps | hot loop | cycles | " + " | ".join(KINDS) + " |")
        print("|---" * (7 + len(KINDS)) + "|")
        for name, facts in sorted(json.loads(done.stdout)[capability].items()):
            cubin = str(Path(folder) / f"{name}.cubin")
            code = subprocess.run([nvdisasm, "-c", "-hex", cubin], stdout=subprocess.PIPE, text=True, check=True).stdout
            found = [loop for part in code.split("\n.text._Z")[1:] for loop in loops(part.split("\n//---")[0])]
            hot = max(found, key=lambda loop: (loop.work, loop.counts["all"]), default=Loop(0, 0, Counter()))
            held = blocks(facts)
            figures = [facts["registers"], facts["shared"], held, held * facts["threads"] // 32]
            figures += [hot.counts["all"], hot.counts["cycles"]]
            print(f"| {name} | " + " | ".join(map(str, figures + [hot.counts[kind] for kind in KINDS])) + " |")


if __name__ == "__main__":
    main()
