"""Speed of the World tokenizer on long texts, after a check that its tokens are the right ones.

    python benchmarks/tokenizer.py TEXT... [-r 5]

The tokens of each text, of random bytes and of all the vocabulary's tokens in a random order are compared with those of
a plain loop in Python. It takes the longest slice that is a token, and shares nothing with the product. Seconds are the
processor's, of which the tokenizer uses one core.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from rwkv_cli.engine.tokenizer import WorldTokenizer, official_vocabulary

BLOCK = 1 << 16
"""Bytes that `rwkv ppl` gives at a time."""


def plain(ids: dict[bytes, int], data: bytes) -> list[int]:
    """Return the ids of the longest tokens, one after the other."""
    longest, out, at = max(map(len, ids)), [], 0
    while at < len(data):
        token = next(data[at : at + n] for n in range(longest, 0, -1) if data[at : at + n] in ids)
        out.append(ids[token])
        at += len(token)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    options = parser.parse_args()
    world = WorldTokenizer.from_vocabulary(official_vocabulary())
    ids = {token: i for i, token in enumerate(world.table) if token}
    rng = np.random.default_rng(0)
    tokens = [world.table[i] for i in rng.permutation(len(world.table))]
    data = {"random bytes": rng.bytes(1 << 20), "all tokens": b"".join(tokens)}
    data |= {path.name: path.read_bytes() for path in options.texts}
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for name, text in data.items():
        blocks = [text[at : at + BLOCK] for at in range(0, len(text), BLOCK)]
        want = plain(ids, text)
        assert world.encode(text) == want, f"{name}: a token is wrong; no figure is worth anything"
        assert [i for piece in world.encode_blocks(blocks) for i in piece.ids] == want, f"{name}, in blocks"
        rates = []
        for _ in range(options.repetitions):
            start = time.process_time()
            for _piece in world.encode_blocks(blocks):
                pass
            rates.append(len(text) / (time.process_time() - start) / 1e6)
        print(f"{name}: {statistics.median(rates):.1f} MB/s, {len(want):,} tokens, {len(text):,} bytes", flush=True)


if __name__ == "__main__":
    main()
