"""Tells where the time of a pass goes on this machine's GPU: each launch of a layer, and the whole pass.

    python benchmarks/gpu_steps.py LAYERS WIDTH RANKS T [T …]
    python benchmarks/gpu_steps.py 32 4096 128,128,96,480 1 252 -- -64
    python benchmarks/gpu_steps.py --quant q4 32 4096 128,128,96,480 1

RANKS are those of w, a, v and g of a random RWKV-7. T > 0 is one sequence of T tokens, −B are B sequences of a token.
A launch is timed as one CUDA graph that has it for every layer, so that weights come from memory and not from a cache.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from random_models import config_of, write_model

import rwkv_cli
from rwkv_cli.kernels.cuda import backend as cuda
from rwkv_cli.kernels.cuda.driver import Graph, synchronize
from rwkv_cli.models import State

VOCAB = 65536
LEAST_SECONDS = 0.1


def seconds(graph: Callable[[], None]) -> float:
    """Seconds of one replay."""
    graph()
    synchronize()
    count = 1
    while True:
        begin = time.perf_counter()
        for _ in range(count):
            graph()
        synchronize()
        took = time.perf_counter() - begin
        if took > LEAST_SECONDS or count >= 1 << 14:
            return took / count
        count = min(1 << 14, max(2 * count, int(count * LEAST_SECONDS / max(took, 1e-6))))


def replay(calls: Sequence[Any]) -> Graph:
    """Some launches as a graph."""
    return Graph(lambda on: [call.kernel.dispatcher[call.grid, call.threads, on](*call.arguments) for call in calls])


def show(step: int, call: Any, each: float) -> None:
    print(
        f"  {step:3d} {call.kernel.name:18s} grid {call.grid!s:16s} × {call.threads!s:6s} {each * 1e6:9.2f} µs",
        flush=True,
    )


def measure(model: Any, T: int, read: int, bandwidth: float) -> None:
    """Print a table for T tokens of one sequence, or for −T sequences."""
    ids = np.arange(max(T, 1)) % VOCAB
    state = model.new_state() if T > 0 else State.stack([model.new_state()] * -T)

    def run() -> None:
        if T > 0:
            model.advance(ids, state)
        else:
            model.advance_batch([[1]] * -T, state)

    for _ in range(3):
        run()
    bound = next(reversed(next(reversed(model._passes.values())).executable._bound.values()))
    calls = bound._calls
    whole = seconds(bound.graph or replay(calls))
    starts = [i for i, call in enumerate(calls) if call.kernel.name.startswith("norm_shift")][::2]
    period = starts[2] - starts[1]
    print(
        f"\nT = {T}: {len(calls)} launches, {period} a layer, {'' if bound.graph else 'no '}graph; "
        f"the pass {whole * 1e3:.3f} ms, {abs(T) / whole:,.0f} tok/s, "
        f"weights at {read / whole / 1e9:,.0f} GB/s = {read / whole / bandwidth:.0%} of a copy"
    )
    total = 0.0
    for step in range(period):
        group = [calls[start + step] for start in starts[1:]]  # the first layer has one product less
        each = seconds(replay(group)) / len(group)
        total += each * len(starts)
        show(step, group[0], each)
    for call in calls[starts[-1] + period :]:
        each = seconds(replay([call]))
        total += each
        show(-1, call, each)
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    call = statistics.median(times)
    print(f"  the launches' sum {total * 1e3:.3f} ms; a call from Python {call * 1e3:.3f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quant", default="int8", help="int8, q6, q5, q4 or none")
    parser.add_argument("layers", type=int)
    parser.add_argument("width", type=int)
    parser.add_argument("ranks", help="w,a,v,g")
    parser.add_argument("T", type=int, nargs="+")
    options = parser.parse_args()
    ranks = dict(zip("wavg", map(int, options.ranks.split(",")), strict=True))
    bandwidth = cuda.read_bandwidth(1)
    print(f"{cuda.describe()}: a copy moves {bandwidth / 1e9:,.0f} GB/s; {options.quant}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        read = write_model(path, config_of("7", options.layers, options.width, 64, VOCAB, ranks), options.quant)
        model = rwkv_cli.load(path, device="cuda")
    for T in options.T:
        measure(model, T, read, bandwidth)


if __name__ == "__main__":
    main()
