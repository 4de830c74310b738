"""Run the reference (the `rwkv` package with torch) on a checkpoint: reference.py VERSION MODEL.pth IDS.json OUT.npy

A process of its own, since the package picks its version when it is imported. Writes logits [T, V] after each id.
"""

import json
import os
import sys

import numpy as np


def main(version: str, model: str, ids: str, out: str) -> None:
    os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0", RWKV_V7_ON="1" if version == "7" else "0")
    import torch
    from rwkv.model import RWKV

    torch.set_num_threads(1)
    lm = RWKV(model.removesuffix(".pth"), "cpu fp32")
    with open(ids) as file:
        tokens = json.load(file)
    state, rows = None, []
    for token in tokens:
        logits, state = lm.forward([token], state)
        rows.append(logits.float().numpy().copy())
    np.save(out, np.array(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
