"""Decode and prefill beside other programs on the same weights, in alternating runs of one sitting.

    python benchmarks/peers.py MODEL.safetensors --gguf MODEL.f16.gguf [--pth MODEL.pth] [-p 512] [-n 32] [-r 5]

llama.cpp runs by llama-cpp-python (pip install llama-cpp-python; it builds for some ten minutes) from a GGUF that was
rounded to Q8_0, the rwkv package in float32 on torch, each in a process of its own. Ratios are medians over pairs of
runs that follow each other. All use the same number of threads and the same tokens. There are no figures where the two
do not compute the same.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

LLAMA = """
import json, sys, time
import numpy as np
from llama_cpp import Llama
model, threads, ids = Llama(sys.argv[1], n_ctx=4096, n_batch=512, n_ubatch=512, n_threads=int(sys.argv[2]),
    n_threads_batch=int(sys.argv[2]), verbose=False, logits_all=False), None, json.loads(sys.argv[3])
def feed(tokens):
    model.eval(tokens)
def reset():
    model.reset(); model._ctx.kv_cache_clear() if hasattr(model._ctx, "kv_cache_clear") else None
def logits():
    import llama_cpp
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model._ctx.ctx, -1), (model.n_vocab(),)).copy()
"""
RWKV = """
import json, os, sys, time
answers, sys.stdout = sys.stdout, sys.stderr
os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
import numpy as np, torch
torch.set_num_threads(int(sys.argv[2]))
from rwkv.model import RWKV
model, ids, state, last = RWKV(sys.argv[1].removesuffix(".pth"), "cpu fp32"), json.loads(sys.argv[3]), None, None
def feed(tokens):
    global state, last
    last, state = model.forward(list(tokens), state)
def reset():
    global state
    state = None
def logits():
    return last.numpy()
"""
OURS = """
import json, sys, time
import rwkv_cli
model, ids = rwkv_cli.load(sys.argv[1], threads=int(sys.argv[2])), json.loads(sys.argv[3])
state = model.new_state()
def feed(tokens):
    global last
    last = model.advance(tokens, state)
def reset():
    global state
    state = model.new_state()
def logits():
    return last
"""
LOOP = """
answers = globals().get("answers", sys.stdout)
reset(); feed(ids[:2]); reset()
for line in sys.stdin:
    what, count = line.split()
    if what == "logits":
        reset(); feed(ids[: int(count)])
        print(json.dumps([float(x) for x in logits()]), file=answers, flush=True); continue
    reset(); feed(ids[:1])
    start = time.perf_counter()
    if what == "prefill":
        feed(ids[: int(count)])
    else:
        for token in ids[: int(count)]:
            feed([token])
    print(int(count) / (time.perf_counter() - start), file=answers, flush=True)
"""


class Peer:
    """A program that answers with its rate, over a pipe, so that only one works at a time."""

    def __init__(self, name: str, code: str, python: str, model: Path, threads: int, ids: list[int]) -> None:
        self.name = name
        # -P: what is installed there, not what lies in this folder
        command = [python, "-P", "-c", code + LOOP, str(model), str(threads), json.dumps(ids)]
        self.process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, what: str, count: int) -> Any:
        self.process.stdin.write(f"{what} {count}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended")
        return json.loads(line)

    def end(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--pth", type=Path)
    parser.add_argument("--python", default=sys.executable, help="the Python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--generate", type=int, default=32)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    options = parser.parse_args()
    import numpy as np

    import rwkv_cli

    model = rwkv_cli.load(options.model)
    vocab, few_bits = min(model.config.vocab, 65500), model.quantization not in ("int8", "none")
    ids = [int(i) for i in np.random.default_rng(0).integers(1, vocab, max(options.prompt, options.generate))]
    ours = Peer("rwkv-cli", OURS, sys.executable, options.model, options.threads, ids)
    peers = []
    if options.gguf:
        peers.append(Peer("llama.cpp", LLAMA, options.python, options.gguf, options.threads, ids))
    if options.pth:
        peers.append(Peer("rwkv package", RWKV, sys.executable, options.pth, options.threads, ids))
    reference = np.array(ours.ask("logits", 32))
    for peer in peers:
        other = np.array(peer.ask("logits", 32))[: len(reference)]
        error = float(np.linalg.norm(reference[: len(other)] - other) / np.linalg.norm(other))
        print(f"{peer.name}: logits differ by {error:.1e} of their norm")
        # Random weights amplify the rounding of both, and most that of 4 bits. Another computation is past 1.
        if not error < (1 if few_bits else 0.5):
            raise SystemExit("they do not compute the same; no figure is worth anything")
        for what, count in (("decode", options.generate), ("prefill", options.prompt)):
            pairs = [(ours.ask(what, count), peer.ask(what, count)) for _ in range(options.repetitions)]
            mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            print(f"  {what} {count}: {mine:.2f} against {theirs:.2f} tokens per second, ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
