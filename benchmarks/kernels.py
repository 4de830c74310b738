"""The kernels of one model's layers against what this machine can do at most, measured in the same run.

    python benchmarks/kernels.py [--width 1024] [--quant int8|q6|q5|q4] [--threads N] [--rounds 15]

Matrices are random and together larger than a cache. Each kernel is first held against float64: no figure where it is
wrong. GB/s counts what is read of the weights, GMAC/s their products with activations of 15
bits. To see another path of the kernels, run it with
NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma before it.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import lab
import naive

from rwkv_cli.kernels.cpu import backend as cpu
from rwkv_cli.kernels.cpu import limits
from rwkv_cli.kernels.cpu.compile import instructions
from rwkv_cli.kernels.cpu.cores import usable_cores
from rwkv_cli.kernels.program import Count, Input, InputMatrix, LayerState, Norm, Product, Program, Wkv7

RNG = np.random.default_rng(0)
_MEMORY = 300 << 20
"""Bytes of weights that a round goes through."""


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def median(run: Callable[[], object], rounds: int) -> float:
    """Seconds."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def check(got: Any, want: Any) -> None:
    """Raise AssertionError if a result is wrong."""
    error = naive.error_ratio(got, want)
    assert error < 1e-4, f"wrong by {error:.1e}; no figure is worth anything"


def product(N: int, K: int, layout: str, T: int, nonzero: float, threads: int, rounds: int) -> tuple[float, float]:
    """Seconds of one x·wᵀ, and the bytes of weights that it reads."""
    stored = lab.quantize(normal(N, K), layout)
    x = normal(T, K)
    x[RNG.random((T, K)) >= nonzero] = 0

    def weight() -> Any:
        return cpu.weight(replace(stored, values=stored.values.copy(), scales=stored.scales.copy()))

    count = max(1, _MEMORY // stored.values.nbytes) if T == 1 else 4
    given = InputMatrix(Count(T), K, name="x")
    program = Program(given)
    out = [program.linear(Product(given, weight()))[0] for _ in range(count)]
    program.keep(out[-1])
    executable = cpu.compile(program, threads)
    executable.run({"x": x})
    want = x @ stored.float32().astype(float).T
    check(executable.read(out[-1]), want)
    used = np.count_nonzero(x) / x.size if layout.startswith("columns") else 1
    return median(lambda: executable.run({"x": x}), rounds) / count, weight().nbytes * used


def recurrence(D: int, T: int, threads: int, rounds: int) -> float:
    """Seconds of RWKV-7's time mixing between its matrices."""
    H, N = D // 64, 64
    r, k, v, g = (normal(T, D) for _ in range(4))
    w, a = np.exp(-0.6 * RNG.random((T, D))).astype(np.float32), RNG.random((T, D)).astype(np.float32)
    state, ones, zeros = np.zeros((1, H, N, N), np.float32), np.ones(D, np.float32), np.zeros(D, np.float32)
    rows, starts = Count(T), Input("starts", (2,), "I64")
    names = ("receptance", "decay", "key", "value", "rate", "gate")
    values = {name: InputMatrix(rows, D, name=name) for name in names}
    states = Input("state", (1, 1, H, N, N))
    program = Program(*values.values(), starts, states)
    y = program.keep(
        program.add(
            Wkv7(
                **values,
                residual=None,
                key_scale=ones,
                key_rate=ones,
                bonus=zeros.reshape(H, N),
                norm=Norm(ones, zeros, 64e-5),
                starts=starts,
                state=LayerState(states, 0),
            )
        )
    )
    executable = cpu.compile(program, threads)
    arrays = dict(zip(names, (r, w, k, v, a, g), strict=True)) | {"starts": np.array([0, T]), "state": state[None]}
    executable.run(arrays)
    r, w, k, v, a = (m.reshape(T, H, N).astype(float) for m in (r, w, k, v, a))
    kappa = k / np.linalg.norm(k, axis=-1, keepdims=True)
    out = naive.wkv7(r, w, k * a, v, kappa, kappa * a, np.zeros((H, N, N)))
    check(executable.read(y), naive.group_norm(out.reshape(T, D), ones, zeros, H, 64e-5) * g)
    return median(lambda: executable.run(arrays), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=usable_cores().physical)
    parser.add_argument("--quant", choices=["int8", "q6", "q5", "q4"], default="int8")
    parser.add_argument("--rounds", type=int, default=15)
    o = parser.parse_args()
    bits = o.quant[1:] if o.quant != "int8" else ""
    tile, columns = f"tile{bits}", f"columns{bits}"
    D, F = o.width, 4 * o.width
    bandwidth, peak = limits.read_bandwidth(o.threads), limits.product_peak(o.threads)
    most = f"{peak / 1e9:.0f} GMAC/s" if peak else "not measured"
    print(f"{instructions()} path, {o.threads} threads, {o.quant}, memory {bandwidth / 1e9:.1f} GB/s, products {most}")
    for name, N, K, layout, nonzero in (
        ("receptance, key, value, output", D, D, tile, 1.0), ("ffn.key", F, D, tile, 1.0),
        ("head", 65536, D, tile, 1.0), ("ffn.value, all of it", D, F, columns, 1.0),
        ("ffn.value, half zeros", D, F, columns, 0.5), ("ffn.value, a quarter left", D, F, columns, 0.25),
        ("ffn.value, a tenth left", D, F, columns, 0.1),
    ):  # fmt: skip
        seconds, read = product(N, K, layout, 1, nonzero, o.threads, o.rounds)
        print(f"1 token    {name:31} {seconds * 1e6:8.1f} µs  {read / seconds / 1e9:6.1f} GB/s   "
              f"{read / seconds / bandwidth:4.0%} of memory's", flush=True)  # fmt: skip
    for name, N, K, layout in (("receptance, key, value, output", D, D, tile), ("ffn.key", F, D, tile),
                               ("ffn.value", D, F, columns)):  # fmt: skip
        seconds, _ = product(N, K, layout, 252, 1.0, o.threads, o.rounds)
        rate = N * K * 252 / seconds
        print(f"252 tokens {name:31} {seconds * 1e6:8.1f} µs  {rate / 1e9:6.1f} GMAC/s "
              + (f"{rate / peak:4.0%} of the most" if peak else ""), flush=True)  # fmt: skip
    for T in (1, 252):
        seconds = recurrence(D, T, o.threads, o.rounds)
        print(f"{T:<3} token{'s' if T > 1 else ' '} WKV-7, norm, bonus, gate        {seconds * 1e6:8.1f} µs  "
              f"{seconds * 1e6 / T / (D // 64):6.2f} µs a head and token", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
