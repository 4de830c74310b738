"""What `rwkv bench` measures."""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwkv_cli.engine import LanguageModel
from rwkv_cli.kernels import limits
from rwkv_cli.kernels.backend import Activation, Array
from rwkv_cli.quant import Checkpoint

_SAMPLE = 8
"""Tokens to count what is read for."""


@dataclass(frozen=True)
class Report:
    """Rates are medians of the repetitions; deviations are standard ones. Bytes, seconds, multiply-adds a second."""

    model: str
    version: str
    parameters: int
    file_bytes: int
    threads: int
    prompt: int
    generate: int
    depth: int
    repetitions: int
    prefill_tokens_per_second: float
    prefill_deviation: float
    prefill_macs: float
    prefill_share: float | None
    """Of the int8 peak, counting both planes of the activations."""
    decode_tokens_per_second: float
    decode_deviation: float
    decode_bandwidth: float
    decode_share: float
    """Of the read bandwidth."""
    bytes_per_token: float
    dense_bytes_per_token: int
    read_bandwidth: float
    int8_peak: float | None
    load_seconds: float
    first_token_seconds: float
    peak_rss: int


class _Counting:
    """A backend that sums up what its matrix products read and multiply."""

    def __init__(self, ops: Any) -> None:
        self.ops, self.read, self.dense, self.macs = ops, 0.0, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def linear(self, x: Array, weight: Any, activation: Activation = "") -> Array:
        size, elements, skips_zeros = self.ops.weight_size(weight)
        self.dense += size
        self.read += size * (np.count_nonzero(x) / x.size if skips_zeros else 1)
        self.macs += elements * len(x)
        y: Array = self.ops.linear(x, weight, activation)
        return y


def measure(
    load: Callable[[], LanguageModel], prompt: int, generate: int, repetitions: int, depth: int,
    progress: Callable[[str], object],
) -> Report:  # fmt: skip
    """Load a model and time it on random tokens."""
    progress("load")
    start = time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    state = model.new_state()
    model.advance([0], state)
    first = time.perf_counter()
    c = model.config
    ids = np.random.default_rng(0).integers(0, c.vocab, max(prompt, generate, depth, _SAMPLE))
    if depth:
        progress(f"depth {depth}")
        model.advance(ids[:depth], state)
    model.forward(ids[:2], state)  # the kernels of prefill
    prefill, decode = [], []
    for repetition in range(repetitions):
        progress(f"prefill {repetition + 1} of {repetitions}")
        copy, begin = state.clone(), time.perf_counter()
        model.advance(ids[:prompt], copy)
        prefill.append(prompt / (time.perf_counter() - begin))
        progress(f"decode {repetition + 1} of {repetitions}")
        copy, begin = state.clone(), time.perf_counter()
        for token in ids[:generate]:
            model.advance([token], copy)
        decode.append(generate / (time.perf_counter() - begin))
    rss = peak_rss()
    progress("what the machine can do")
    bandwidth, peak = limits.read_bandwidth(), limits.int8_peak()
    ops, counting = model.ops, _Counting(model.ops)
    model.ops = counting
    for token in ids[:_SAMPLE]:
        model.advance([token], state)
    read, dense = counting.read / _SAMPLE, counting.dense // _SAMPLE
    counting.macs = 0
    model.advance(ids[:prompt], state)
    model.ops = ops
    prefill_rate, decode_rate = statistics.median(prefill), statistics.median(decode)
    prefill_macs = counting.macs / prompt * prefill_rate
    checkpoint = Checkpoint(model.path)
    parameters = sum(math.prod(checkpoint.layout(name)["shape"]) for name in checkpoint.names())
    return Report(
        str(model.path), c.version, parameters, model.path.stat().st_size, model.threads,
        prompt, generate, depth, repetitions,
        prefill_rate, _deviation(prefill), prefill_macs, 2 * prefill_macs / peak if peak else None,
        decode_rate, _deviation(decode), read * decode_rate, read * decode_rate / bandwidth,
        read, dense, bandwidth, peak, loaded - start, first - loaded, rss,
    )  # fmt: skip


def _deviation(rates: list[float]) -> float:
    return statistics.stdev(rates) if len(rates) > 1 else 0.0


def peak_rss() -> int:
    """Most memory that this process has held, mapped files included, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
