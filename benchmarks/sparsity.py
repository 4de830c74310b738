"""How many values of the channel mix are not zero after relu², layer by layer: what a sparse decode can skip.

python benchmarks/sparsity.py MODEL.safetensors TEXT [--limit 4096]
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import rwkv_cli
from rwkv_cli.engine.measuring import Watched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--limit", type=int, default=4096, help="tokens (default: 4096)")
    options = parser.parse_args()
    model = rwkv_cli.load(options.model)
    ids = [0, *model.text_tokenizer.encode(options.text.read_bytes())][: options.limit]
    watched = Watched(model.ops)
    model.ops = watched  # type: ignore[assignment]
    found: list[Any] = []
    state = model.new_state()
    for token in ids:
        model.advance([token], state)
        for recorder, product in watched.products:
            if model.ops.weight_size(product.weight)[2]:
                x = recorder.read(product.x)
                found.append((np.count_nonzero(x), x.size))
    layers = np.array(found).reshape(-1, model.config.layers, 2).sum(0)
    for layer, (some, all_) in enumerate(layers):
        print(f"layer {layer}: {some / all_:6.1%} not zero")
    print(f"all:     {layers[:, 0].sum() / layers[:, 1].sum():6.1%} not zero, {len(ids)} tokens")


if __name__ == "__main__":
    main()
