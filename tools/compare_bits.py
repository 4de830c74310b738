"""Compare the bits of two installed versions of rwkv-cli.

    python tools/compare_bits.py PYTHON_A PYTHON_B --checkpoints FOLDER … [--cpu haswell]

PYTHON_A and PYTHON_B are interpreters, each with one version installed. Both versions convert every .pth in the
folders and run random token ids through the result: one at a time, in chunks, in batches, and for losses. The table
says where the converted files, logits and states agree. The exit code is 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CPUS = {"haswell": "+avx2,+fma,+f16c,+bmi,+bmi2", "x86-64": ""}
"""Features, for numba, of the CPUs that kernels can be compiled for instead of this one."""
LENGTHS = [1, 2, 5, 7, 13, 64, 251, 252, 253, 300, 600]
"""Lengths of prompts; a model takes 252 tokens together."""
BATCHES = [[3, 1, 7], [1] * 3, [2, 9, 1, 31, 5], [250, 1, 3, 17], [300, 13, 5, 1, 1, 2, 77, 3, 9], [1] * 9]
"""Lengths of the sequences of each step of a batch."""
COLUMNS = ["file", "serial", "chunked", "all_logits", "batched", "losses"]

Digests = dict[str, list[str]]


def sha256(*arrays: Any) -> str:
    """Digest of the arrays' bytes, shapes and types."""
    import numpy as np

    digest = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def compute(model_path: Path, device: str, threads: Sequence[int]) -> Digests:
    """Digests of all that a model computes, by column. This runs in each interpreter and needs its public API only."""
    import numpy as np

    import rwkv_cli
    from rwkv_cli.models import State

    found: Digests = defaultdict(list)

    def add(column: str, result: Any, state: Any) -> None:
        found[column] += [sha256(result), sha256(state.att_shift, state.ffn_shift, state.wkv)]

    for count in threads:
        model = rwkv_cli.load(model_path, device=device, threads=count)
        rng = np.random.default_rng(0)

        def ids(length: int, rng: Any = rng, vocab: int = model.config.vocab) -> Any:
            return rng.integers(0, vocab, length)

        state = model.new_state()
        for token in ids(40):
            add("serial", model.advance([token], state), state)
        chunked, every, scored = model.new_state(), model.new_state(), model.new_state()
        for length in LENGTHS:
            logits, chunked = model.forward(ids(length), chunked)
            add("chunked", logits, chunked)
            add("all_logits", model.advance(ids(length), every, all_logits=True), every)
            add("losses", model.losses(ids(length), ids(length), scored), scored)
        for lengths in BATCHES:
            # every sequence has a past of its own
            batch = State.stack([model.forward(ids(length))[1] for length in range(1, len(lengths) + 1)])
            for _ in range(2):
                add("batched", model.advance_batch([ids(length) for length in lengths], batch), batch)
            add("batched", model.advance_batch([ids(1) for _ in lengths], batch), batch.row(len(lengths) - 1))
    return found


def run(python: Path, *command: str | Path, folder: Path, cpu: str | None) -> subprocess.CompletedProcess[str]:
    """A finished process of one of the two interpreters."""
    chosen = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": CPUS[cpu]} if cpu else {}
    return subprocess.run(
        [python, "-P", *command], cwd=folder, env={**os.environ, **chosen}, capture_output=True, text=True, check=False
    )


def digests(python: Path, source: Path, quant: str, options: argparse.Namespace) -> Digests:
    """The digests of all that one version makes of a checkpoint. A refusal to convert it counts as the file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model.safetensors"
        convert: list[str | Path] = ["-m", "rwkv_cli", "convert", source, model.name, "--quant", quant]
        done = run(python, *convert, folder=folder, cpu=options.cpu)
        if done.returncode:
            return {"file": [done.stderr]}
        work: list[str | Path] = [Path(__file__).resolve(), "--work", model, "--device", options.device, "--threads"]
        # the first run only compiles: sums of a kernel just compiled can come in another order than from the cache
        for threads in ([1], options.threads):
            done = run(python, *work, *map(str, threads), folder=folder, cpu=options.cpu)
            if done.returncode:
                raise SystemExit(f"{python} on {source}, {quant}:\n{done.stderr}")
        computed: Digests = json.loads(done.stdout)
        return {"file": [hashlib.sha256(model.read_bytes()).hexdigest()], **computed}


def verdict(a: list[str], b: list[str]) -> str:
    """The text of a cell."""
    different = sum(x != y for x, y in zip(a, b, strict=True)) if len(a) == len(b) else len(a)
    return f"DIFFERENT {different}/{len(a)}" if different else "same" if a else "-"


def main() -> None:
    """Compare two versions, or do the work of one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", type=Path, nargs="*", metavar="PYTHON")
    parser.add_argument("--checkpoints", type=Path, nargs="+", default=[])
    parser.add_argument("--quant", nargs="+", default=["int8", "none"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu", choices=CPUS, help="compile the kernels for this CPU instead")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(compute(options.work, options.device, options.threads)))
        return
    if len(options.pythons) != 2:
        parser.error("give two interpreters")
    pythons = [python.absolute() for python in options.pythons]
    sources = sorted(path.resolve() for folder in options.checkpoints for path in [folder, *folder.rglob("*.pth")])
    sources = [path for path in sources if path.is_file()]
    if not sources:
        parser.error("no .pth in --checkpoints")
    width = max(len(f"{path.parent.name}/{path.name}") for path in sources)
    print(f"{'checkpoint':{width}}  quant", *(f"{column:>15}" for column in COLUMNS))
    equal = True
    for source in sources:
        for quant in options.quant:
            a, b = (digests(python, source, quant, options) for python in pythons)
            cells = [verdict(a.get(column, []), b.get(column, [])) for column in COLUMNS]
            equal &= a == b
            name = f"{source.parent.name}/{source.name}"
            print(f"{name:{width}}  {quant:5}", *(f"{cell:>15}" for cell in cells), flush=True)
    print("every bit is the same" if equal else "the versions differ")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
