"""Run a reference on a checkpoint: run_reference.py VERSION MODEL.pth IDS.json OUT.npy [RWKV-LM]

It is the `rwkv` package with torch, or for versions that the package lacks a demo of RWKV-LM, whose folder comes last.
It runs in a process of its own, since the package picks its version when it is imported. Writes logits [T, V] after
each id.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

DEMOS = {"7a": "rwkv_v7a_demo.py", "8-rc00": "rwkv_v8_rc00_demo.py"}


def package(version: str, model: str) -> Any:
    """The model as the `rwkv` package reads it."""
    os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0", RWKV_V7_ON="1" if version == "7" else "0")
    from rwkv.model import RWKV

    return RWKV(model.removesuffix(".pth"), "cpu fp32")


def demo(path: Path, model: str) -> Any:
    """The model as a demo of RWKV-LM reads it, in float32 on the CPU and without its kernels of CUDA."""
    import torch
    import torch.utils.cpp_extension

    torch.utils.cpp_extension.load = lambda **_: None
    z = torch.load(model)
    rank = z["blocks.0.ffn.s1"].shape[1] if "blocks.0.ffn.s1" in z else 32
    facts = {
        "MODEL_NAME": model.removesuffix(".pth"),
        "n_layer": 1 + max(int(name.split(".")[1]) for name in z if name.startswith("blocks.")),
        "n_embd": z["emb.weight"].shape[1],
        "vocab_size": z["emb.weight"].shape[0],
        "head_size": z["blocks.0.att.r_k"].shape[1],
    }
    source, _ = path.read_text(encoding="utf-8").split("# The testing code")
    for name, value in facts.items():
        source = re.sub(rf"^args\.{name} = .*$", f"args.{name} = {value!r}", source, flags=re.MULTILINE)
    for pattern, instead in (
        (r" *@My(Function|Static)\n", ""),
        (r"torch\.jit\.ScriptModule", "nn.Module"),
        (r"torch\.half", "torch.float32"),
        (r"""(?<==)['"]cuda['"]""", "'cpu'"),
        (r"view\(32,32\)", f"view({rank},{rank})"),
    ):
        source = re.sub(pattern, instead, source)
    scope: dict[str, Any] = {}
    exec(source, scope)
    return scope["RWKV_x070"](scope["args"])


def main(version: str, model: str, ids: str, out: str, folder: str = "") -> None:
    import torch

    torch.set_num_threads(1)
    lm = demo(Path(folder, "RWKV-v7", DEMOS[version]), model) if version in DEMOS else package(version, model)
    with open(ids) as file:
        tokens = json.load(file)
    state, rows = None, []
    for token in tokens:
        logits, state = lm.forward([token], state)
        rows.append(logits.float().numpy().copy())
    np.save(out, np.array(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
