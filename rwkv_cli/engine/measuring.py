"""The speed of a model, and what each token costs."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.kernels.contract import Loadable
from rwkv_cli.kernels.program import Value
from rwkv_cli.models.base import PassKind
from rwkv_cli.quant import Checkpoint

_ONE_TOKEN = PassKind("last", single=True, sequences=1)
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
    """The share of the int8 peak, counting both planes of the activations."""
    decode_tokens_per_second: float
    decode_deviation: float
    decode_bandwidth: float
    decode_share: float
    """The share of the read bandwidth. On a GPU this is that of a copy, reads and writes together."""
    bytes_per_token: float
    dense_bytes_per_token: int
    read_bandwidth: float
    int8_peak: float | None
    load_seconds: float
    kernel_seconds: float
    """The time that kernels took to load, or to compile."""
    first_token_seconds: float
    peak_rss: int | None


@dataclass(frozen=True)
class Traffic:
    """The cost of a token in a model's matrices."""

    read: float
    """Bytes, on average over some tokens."""
    dense: int
    """Bytes, if none were skipped for an input of zero."""
    layers: int
    """Multiply-adds of the layers."""
    head: int
    """Multiply-adds of the head, which a prompt needs once."""


def watched_tokens(model: LanguageModel, ids: Iterable[int]) -> Iterator[list[float]]:
    """For each of `ids`, one after the other: what share is not zero of each input whose zeros a product can skip."""
    program = model.write_pass(_ONE_TOKEN).program
    skipped = [p.x for p in program.products() if p.weight.skips_zeros and isinstance(p.x, Value)]
    for factor in skipped:
        program.keep(factor)
    executable = model.backend.compile(program, model.threads)
    arrays = {name: array[:, None] for name, array in model.new_state().arrays().items()}
    arrays |= {"starts": np.array([0, 1]), "ends": np.array([0])}
    for token in ids:
        executable.run({"ids": np.array([token]), **arrays})
        factors = map(executable.read, skipped)
        yield [np.count_nonzero(x) / x.size for x in factors]


def traffic(model: LanguageModel, ids: Iterable[int]) -> Traffic:
    """Count what each of `ids` reads, from the program of a pass."""
    products = list(model.write_pass(_ONE_TOKEN).program.products())
    dense = sum(p.weight.nbytes for p in products)
    skipping = np.array([p.weight.nbytes for p in products if p.weight.skips_zeros])
    read = [dense - float(skipping @ (1 - np.array(shares))) for shares in watched_tokens(model, ids)]
    macs = [math.prod(p.weight.shape) for p in products]
    return Traffic(statistics.mean(read), dense, sum(macs[:-1]), macs[-1])


def measure(
    load: Callable[[], LanguageModel],
    load_kernels: Callable[[list[Loadable]], object],
    *,
    prompt: int,
    generate: int,
    repetitions: int,
    depth: int,
    progress: Callable[[str], object],
) -> Report:
    """Load a model and time it on random tokens."""
    start = time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    load_kernels([*model.kernels("last"), *model.backend.limit_kernels()])
    model.prepare("last")
    ready = time.perf_counter()
    state = model.new_state()
    model.advance([0], state)
    first = time.perf_counter()
    c = model.config
    ids = np.random.default_rng(0).integers(0, c.vocab, max(prompt, generate, depth, _SAMPLE))
    if depth:
        progress(f"{depth} tokens before")
        model.advance(ids[:depth], state, watch=lambda _: None)  # Ctrl-C comes then
    prefill, decode = [], []
    for repetition in range(repetitions):
        progress(f"reading, {repetition + 1} of {repetitions}")
        copy, begin = state.clone(), time.perf_counter()
        model.advance(ids[:prompt], copy, watch=lambda _: None)
        prefill.append(prompt / (time.perf_counter() - begin))
        progress(f"writing, {repetition + 1} of {repetitions}")
        copy, begin = state.clone(), time.perf_counter()
        for token in ids[:generate]:
            model.advance([token], copy)
        decode.append(generate / (time.perf_counter() - begin))
    rss = peak_rss()
    progress("what the machine can do")
    seen = traffic(model, ids[:_SAMPLE])
    path, threads, backend, device = model.path, model.threads, model.backend, model.backend.describe()
    del model, state, copy  # before there is more: not every device has room beside a model
    bandwidth, peak = backend.read_bandwidth(threads), backend.int8_peak(threads)
    prefill_rate, decode_rate = statistics.median(prefill), statistics.median(decode)
    prefill_macs = (seen.layers + seen.head / prompt) * prefill_rate
    checkpoint = Checkpoint(path)
    parameters = sum(math.prod(checkpoint.layout(name)["shape"]) for name in checkpoint.names())
    return Report(
        model=str(path),
        device=device,
        version=c.version,
        parameters=parameters,
        file_bytes=path.stat().st_size,
        threads=threads,
        prompt=prompt,
        generate=generate,
        depth=depth,
        repetitions=repetitions,
        prefill_tokens_per_second=prefill_rate,
        prefill_deviation=_deviation(prefill),
        prefill_macs=prefill_macs,
        prefill_share=2 * prefill_macs / peak if peak else None,
        decode_tokens_per_second=decode_rate,
        decode_deviation=_deviation(decode),
        decode_bandwidth=seen.read * decode_rate,
        decode_share=seen.read * decode_rate / bandwidth,
        bytes_per_token=seen.read,
        dense_bytes_per_token=seen.dense,
        read_bandwidth=bandwidth,
        int8_peak=peak,
        load_seconds=loaded - start,
        kernel_seconds=ready - loaded,
        first_token_seconds=first - ready,
        peak_rss=rss,
    )


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
