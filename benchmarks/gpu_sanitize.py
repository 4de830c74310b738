"""Runs every kernel a few times on this machine's GPU, for compute-sanitizer to watch; compares nothing.

python benchmarks/gpu_sanitize.py 7          # compiles kernels, which the tools should not watch
compute-sanitizer --tool memcheck python benchmarks/gpu_sanitize.py 7
"""

import sys
import tempfile
from pathlib import Path

import gpu
import numpy as np

import rwkv_cli
from rwkv_cli.models import State

RANKS = {"6": {"mix": 32, "decay": 64}, "7": {"w": 32, "a": 40, "v": 16, "g": 64}}
LENGTHS = (1, 1, 1, 5, 20, 60, 100, 100)
"""A token alone, launched, captured and replayed; then a prompt for each shape of the product's kernel."""

versions = sys.argv[1:] or ("7", "6", "4")
for version, quant in [*((version, "int8") for version in versions), *(("7", q) for q in gpu.CODES if "7" in versions)]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        gpu.write_model(path, gpu.config_of(version, 2, 128, 64, 512, RANKS.get(version, {})), quant)
        model = rwkv_cli.load(path, device="cuda")
    state = model.new_state()
    for T in LENGTHS:
        logits = model.advance(np.arange(T), state)
        assert np.isfinite(logits).all(), (version, quant, T)
    batch = State.stack([state, model.new_state(), state])
    model.advance_batch([[1], [2, 3], [4]], batch)
    nll = model.losses(np.arange(40), np.arange(40), model.new_state()).mean()
    print(version, quant, nll, flush=True)
