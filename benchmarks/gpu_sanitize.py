"""Runs every kernel a few times on this machine's GPU, for compute-sanitizer to watch; compares nothing.

python benchmarks/gpu_sanitize.py 7          # compiles kernels, which the tools should not watch
compute-sanitizer --tool memcheck python benchmarks/gpu_sanitize.py 7
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from random_models import CODES, config_of, write_model

import rwkv_cli
from rwkv_cli.models import Config, State

RANKS = {"6": {"mix": 32, "decay": 64}, "7": {"w": 32, "a": 40, "v": 16, "g": 64}}
LENGTHS = (1, 1, 1, 5, 20, 60, 100, 100)
"""A token alone, launched, captured and replayed; then a prompt for each shape of the product's kernel."""


def run_all(config: Config, quant: str, lengths: Sequence[int]) -> float:
    """Run a random model on texts of these lengths, a batch and losses. Return the mean loss."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        write_model(path, config, quant)
        model = rwkv_cli.load(path, device="cuda")
    state = model.new_state()
    for T in lengths:
        logits = model.advance(np.arange(T), state)
        assert np.isfinite(logits).all(), (config.version, quant, T)
    batch = State.stack([state, model.new_state(), state])
    model.advance_batch([[1], [2, 3], [4]], batch)
    ids = np.arange(min(40, config.vocab))
    return float(model.losses(ids, ids, model.new_state()).mean())


def main() -> None:
    versions = sys.argv[1:] or ("7", "6", "4")
    quants = [*((version, "int8") for version in versions)]
    quants += [("7", quant) for quant in (*CODES, "none") if "7" in versions]
    for version, quant in quants:
        config = config_of(version, 2, 128, 64, 512, RANKS.get(version, {}))
        print(version, quant, run_all(config, quant, LENGTHS), flush=True)


if __name__ == "__main__":
    main()
