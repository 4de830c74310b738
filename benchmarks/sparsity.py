"""How many values of the channel mix are not zero after relu², layer by layer: what a sparse decode can skip.

python benchmarks/sparsity.py MODEL.safetensors TEXT [--limit 4096]
"""

import argparse
from pathlib import Path

import numpy as np

import rwkv_cli
from rwkv_cli.engine.measuring import watched_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--limit", type=int, default=4096, help="tokens (default: 4096)")
    options = parser.parse_args()
    model = rwkv_cli.load(options.model)
    ids = [0, *model.text_tokenizer.encode(options.text.read_bytes())][: options.limit]
    layers = np.mean(list(watched_tokens(model, ids)), axis=0)
    for layer, share in enumerate(layers):
        print(f"layer {layer}: {share:6.1%} not zero")
    print(f"all:     {layers.mean():6.1%} not zero, {len(ids)} tokens")


if __name__ == "__main__":
    main()
