"""Run a Hugging Face folder in transformers: run_transformers.py FOLDER IDS.json OUT.npy

A process of its own, since transformers warns of much. Writes logits [T, V]. RWKV-4 is transformers' own
RwkvForCausalLM, and RWKV-7 is the readable one of the package rwkv7-hf.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch


def main(folder: str, ids: str, out: str) -> None:
    torch.set_num_threads(1)
    kind = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    if kind == "rwkv":
        from transformers import RwkvForCausalLM as Model
    else:
        from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM as Model
    model = Model.from_pretrained(folder, torch_dtype=torch.float32).eval()
    if getattr(model.config, "tie_word_embeddings", False):
        # transformers 5 leaves this to the model's class, and that of rwkv7-hf was written for transformers 4
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    with torch.no_grad():
        logits = model(torch.tensor([json.loads(Path(ids).read_text())])).logits[0]
    np.save(out, logits.float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
