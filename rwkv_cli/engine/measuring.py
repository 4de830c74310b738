"""The speed of a model, and what each token costs."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.model import LanguageModel, obey
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
    prefill_work: float
    """`prefill_macs` in units of the product peak: a product with 8 bits can take less than one."""
    prefill_share: float | None
    """The share of the product peak."""
    decode_tokens_per_second: float
    decode_deviation: float
    decode_bandwidth: float
    decode_share: float
    """The share of the read bandwidth. On a GPU this is that of a copy, reads and writes together."""
    bytes_per_token: float
    dense_bytes_per_token: int
    read_bandwidth: float
    product_peak: float | None
    """Products of an int8 weight and an activation of 15 bits a second."""
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
    work: float
    """Those of the layers in units of the product peak."""


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
    work = sum(model.backend.work(p) for p in products[:-1])
    return Traffic(statistics.mean(read), dense, sum(macs[:-1]), macs[-1], work)


IdsOf = Callable[[int], NDArray[np.int64]]
"""A function of a vocabulary's size that gives random tokens of it."""


class _Runs:
    """A loaded model, and how long it took for what."""

    def __init__(
        self,
        load: Callable[[], LanguageModel],
        load_kernels: Callable[[list[Loadable]], object],
        ids: IdsOf,
        depth: int,
    ) -> None:
        start = time.perf_counter()
        self.model = load()
        loaded = time.perf_counter()
        load_kernels([*self.model.kernels("last"), *self.model.backend.limit_kernels()])
        self.model.prepare("last")
        ready = time.perf_counter()
        self._state = self.model.new_state()
        self.model.advance([0], self._state)
        self.load_seconds, self.kernel_seconds = loaded - start, ready - loaded
        self.first_token_seconds = time.perf_counter() - ready
        self._ids = ids(self.model.config.vocab)
        if depth:
            self.model.advance(self._ids[:depth], self._state, watch=obey)
        self.prefill: list[float] = []
        self.decode: list[float] = []

    def read(self, tokens: int) -> None:
        """Time the reading of a prompt."""
        copy, begin = self._state.clone(), time.perf_counter()
        self.model.advance(self._ids[:tokens], copy, watch=obey)
        self.prefill.append(tokens / (time.perf_counter() - begin))

    def write(self, tokens: int) -> None:
        """Time some tokens, one after the other."""
        copy, begin = self._state.clone(), time.perf_counter()
        for token in self._ids[:tokens]:
            self.model.advance([token], copy)
        self.decode.append(tokens / (time.perf_counter() - begin))

    def traffic(self) -> Traffic:
        """The bytes that each of a few tokens reads."""
        return traffic(self.model, self._ids[:_SAMPLE])


def measure(
    loads: Sequence[Callable[[], LanguageModel]],
    load_kernels: Callable[[list[Loadable]], object],
    *,
    prompt: int,
    generate: int,
    repetitions: int,
    depth: int,
    progress: Callable[[str], object],
) -> list[Report]:
    """Load models and time them on random tokens. Runs of several alternate, so that all meet the same machine."""

    def ids(vocab: int) -> NDArray[np.int64]:
        return np.random.default_rng(0).integers(0, vocab, max(prompt, generate, depth, _SAMPLE))

    runs = [_Runs(load, load_kernels, ids, depth) for load in loads]
    for repetition in range(repetitions):
        for run in runs:
            progress(f"reading, {repetition + 1} of {repetitions}")
            run.read(prompt)
        for run in runs:
            progress(f"writing, {repetition + 1} of {repetitions}")
            run.write(generate)
    rss = peak_rss() if len(runs) == 1 else None
    progress("what the machine can do")
    facts = [_facts(run, prompt) for run in runs]
    model = runs[0].model
    threads, backend, device = model.threads, model.backend, model.backend.describe()
    del model, runs  # before there is more: not every device has room beside a model
    bandwidth, peak = backend.read_bandwidth(threads), backend.product_peak(threads)
    return [
        Report(
            **known,
            device=device,
            threads=threads,
            prompt=prompt,
            generate=generate,
            depth=depth,
            repetitions=repetitions,
            prefill_share=known["prefill_work"] / peak if peak else None,
            decode_share=known["decode_bandwidth"] / bandwidth,
            read_bandwidth=bandwidth,
            product_peak=peak,
            peak_rss=rss,
        )
        for known in facts
    ]


def _facts(run: _Runs, prompt: int) -> dict[str, Any]:
    """The fields of a report that are known without the machine's limits."""
    seen, path = run.traffic(), run.model.path
    checkpoint = Checkpoint(path)
    prefill, decode = statistics.median(run.prefill), statistics.median(run.decode)
    return {
        "model": str(path),
        "version": run.model.config.version,
        "parameters": sum(math.prod(checkpoint.layout(name)["shape"]) for name in checkpoint.names()),
        "file_bytes": path.stat().st_size,
        "prefill_tokens_per_second": prefill,
        "prefill_deviation": _deviation(run.prefill),
        "prefill_macs": (seen.layers + seen.head / prompt) * prefill,
        "prefill_work": (seen.work + seen.head / prompt) * prefill,
        "decode_tokens_per_second": decode,
        "decode_deviation": _deviation(run.decode),
        "decode_bandwidth": seen.read * decode,
        "bytes_per_token": seen.read,
        "dense_bytes_per_token": seen.dense,
        "load_seconds": run.load_seconds,
        "kernel_seconds": run.kernel_seconds,
        "first_token_seconds": run.first_token_seconds,
    }


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
