"""Files of states of tiny models: whole, damaged, and tuned ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from safetensors.numpy import load_file, save_file

import rwkv_cli
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.models import State


def read(path: Path, text: bytes = b"Once") -> State:
    """The state of a model after a text."""
    return rwkv_cli.load(path).forward(list(text))[1]


def damaged(path: Path, kind: str) -> None:
    """Spoil a saved state."""
    arrays, metadata = load_file(path), State.read_metadata(path)
    if kind in ("nan", "inf"):
        arrays["wkv"][0].flat[3] = float(kind)
    elif kind == "dtype":
        arrays["wkv"] = arrays["wkv"].astype(np.float16)
    elif kind == "shape":
        arrays["att_shift"] = arrays["att_shift"][:, :-1].copy()
    elif kind == "missing":
        del arrays["ffn_shift"]
    elif kind == "foreign":
        metadata = {}
    elif kind in ("ids", "counts", "deep", "seed", "random", "nowhere"):
        random = Sampler(Sampling(), 5).random
        good = {"ids": [], "counts": {}, "seed": 5, "random": random}
        bad: dict[str, dict[str, Any]] = {
            "ids": {"ids": [256]},
            "counts": {"counts": {"1": float("nan")}},
            "seed": {"seed": [5]},
            "random": {"random": random | {"state": {"state": 1.5, "inc": 1}}},
            "nowhere": {"random": random | {"state": {"state": 1 << 128, "inc": 1}}},
        }
        metadata["going_on"] = "[" * 10**5 if kind == "deep" else json.dumps(good | bad[kind])
    save_file(arrays, path, metadata)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "version":
        save_file(arrays, path, metadata | {"rwkv": "6"})


def tuned_tensors(version: str = "7", layers: int = 3, heads: int = 3, size: int = 16) -> tiny.Tensors:
    """A tuned state as official programs write it, [value, key]."""
    rng = np.random.default_rng(tiny.VERSIONS.index(version))
    return {
        f"blocks.{i}.att.time_state": rng.standard_normal((heads, size, size)).astype(np.float32)
        for i in range(layers)
    }  # fmt: skip
