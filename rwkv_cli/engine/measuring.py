"""What `rwkv bench` measures."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.kernels.contract import Product
from rwkv_cli.quant import Checkpoint

_SAMPLE = 8
"""Tokens to count what is read for."""


@dataclass(frozen=True)
class Report:
    """Rates are medians of the repetitions; deviations are standard ones. Bytes, seconds, multiply-adds a second."""

    model: str
    device: str
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
    """Of the read bandwidth; on a GPU of that of a copy, reads and writes together."""
    bytes_per_token: float
    dense_bytes_per_token: int
    read_bandwidth: float
    int8_peak: float | None
    load_seconds: float
    first_token_seconds: float
    peak_rss: int | None


class Watched:
    """A backend whose programs remember what each matrix product reads."""

    def __init__(self, ops: Any) -> None:
        self.ops, self.products = ops, list[tuple[Any, Product]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def record(self, inputs: Sequence[Any], threads: int) -> Any:
        return _WatchedRecorder(self.ops.record(inputs, threads), self.products)


class _WatchedRecorder:
    """Holds the arrays, which therefore serve nothing else and can be read after a run."""

    def __init__(self, recorder: Any, products: list[tuple[Any, Product]]) -> None:
        self.recorder, self.products = recorder, products

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recorder, name)

    def linear(self, *products: Product) -> Any:
        self.products += [(self.recorder, product) for product in products]
        return self.recorder.linear(*products)

    def add_linear(self, x: Any, y: Any, weight: Any) -> None:
        self.products.append((self.recorder, Product(y, weight)))
        self.recorder.add_linear(x, y, weight)


@dataclass(frozen=True)
class Traffic:
    """Of the matrices of a model, by token."""

    read: float
    """Bytes, on average over some tokens."""
    dense: int
    """Bytes, if none were skipped for an input of zero."""
    layers: int
    """Multiply-adds of the layers."""
    head: int
    """Multiply-adds of the head, which a prompt needs once."""


def traffic(load: Callable[[], LanguageModel], ids: Iterable[int]) -> Traffic:
    """Load a model and see what each of `ids` reads."""
    model = load()
    ops = model.ops
    watched = Watched(ops)
    model.ops = watched
    state = model.new_state()
    read, dense, macs = [], 0, [0]
    for token in ids:
        model.advance([token], state)
        read.append(0.0)
        dense, macs = 0, []
        for recorder, product in watched.products:
            size, elements, skips_zeros = ops.weight_size(product.weight)
            dense += size
            macs.append(elements)
            if skips_zeros:
                x = recorder.read(product.x)
                size *= np.count_nonzero(x) / x.size
            read[-1] += size
    return Traffic(statistics.mean(read), dense, sum(macs[:-1]), macs[-1])


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
    model.forward(ids[:prompt], state)  # compiles and records
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
    path, threads, ops, device = model.path, model.threads, model.ops, model.ops.describe()
    del model, state, copy  # before there is more: not every device has room beside a model
    bandwidth, peak = ops.read_bandwidth(threads), ops.int8_peak(threads)
    seen = traffic(load, ids[:_SAMPLE])
    prefill_rate, decode_rate = statistics.median(prefill), statistics.median(decode)
    prefill_macs = (seen.layers + seen.head / prompt) * prefill_rate
    checkpoint = Checkpoint(path)
    parameters = sum(math.prod(checkpoint.layout(name)["shape"]) for name in checkpoint.names())
    return Report(
        str(path), device, c.version, parameters, path.stat().st_size, threads,
        prompt, generate, depth, repetitions,
        prefill_rate, _deviation(prefill), prefill_macs, 2 * prefill_macs / peak if peak else None,
        decode_rate, _deviation(decode), seen.read * decode_rate, seen.read * decode_rate / bandwidth,
        seen.read, seen.dense, bandwidth, peak, loaded - start, first - loaded, rss,
    )  # fmt: skip


def _deviation(rates: list[float]) -> float:
    return statistics.stdev(rates) if len(rates) > 1 else 0.0


def peak_rss() -> int | None:
    """Most memory that this process has held, mapped files included, in bytes; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
