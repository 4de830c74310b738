"""Perplexity of a text, and how two models differ on it, in constant memory."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.model import LanguageModel, check_finite
from rwkv_cli.errors import TokenizerError
from rwkv_cli.kernels.program import Count, CrossEntropy, Divergence, Input, InputMatrix, Program
from rwkv_cli.models import State
from rwkv_cli.models.base import CHUNK

_BLOCK = 1 << 16
_LOGITS = 16 << 20
"""Most logits held at once, in numbers."""


@dataclass
class Mean:
    """Running mean and its standard error (Welford, merged by blocks)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        n = len(values)
        if n == 0:
            return
        mean = float(values.mean())
        delta = mean - self.mean
        total = self.count + n
        self.squares += float(((values - mean) ** 2).sum()) + delta * delta * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def stderr(self) -> float:
        """Of the mean, for independent values; NaN for fewer than two."""
        return math.sqrt(self.squares / (self.count - 1) / self.count) if self.count > 1 else math.nan


_ENDS = np.unique(np.rint(2.0 ** (np.arange(124) / 2)).astype(np.int64))
"""Last positions of the bins: two an octave, one of them at the power of two, as contexts mostly end."""


class Bin(NamedTuple):
    """NLL of the tokens at positions `first` to `last` (both included) of their contexts."""

    first: int
    last: int
    tokens: int
    nll: float
    stderr: float


class ByPosition:
    """NLL by a token's position in its context, which begins with position 1."""

    def __init__(self) -> None:
        self.means = [Mean() for _ in _ENDS]
        self.last = 0

    def add(self, first: int, nll: NDArray[np.float64]) -> None:
        """NLL of consecutive tokens, the first of them at position `first`."""
        stop = first + len(nll)
        start, end = np.searchsorted(_ENDS, [first, stop])
        for mean, values in zip(self.means[start:], np.split(nll, _ENDS[start:end] + 1 - first), strict=False):
            mean.add(values)
        self.last = max(self.last, stop - 1)

    def bins(self) -> tuple[Bin, ...]:
        """Those with tokens, in order."""
        firsts, lasts = [1, *(_ENDS[:-1] + 1).tolist()], _ENDS.tolist()
        return tuple(
            Bin(first, min(last, self.last), mean.count, mean.mean, mean.stderr)
            for first, last, mean in zip(firsts, lasts, self.means, strict=True)
            if mean.count
        )


@dataclass
class Quantile:
    """High quantiles of non-negative numbers from a histogram of 1,000 bins a decade: exact to 0.3 %."""

    bins: NDArray[np.int64] = field(default_factory=lambda: np.zeros(18_000, np.int64))

    def add(self, values: NDArray[np.float64]) -> None:
        position = (np.log10(np.maximum(values, 1e-15)) + 15) * 1000
        np.add.at(self.bins, np.clip(position.astype(np.int64), 0, len(self.bins) - 1), 1)

    def at(self, share: float) -> float:
        """The value that `share` of the numbers do not exceed; 0 for what is within rounding of it."""
        rank = math.ceil(share * int(self.bins.sum()))
        index = int(np.searchsorted(np.cumsum(self.bins), rank))
        return float(10 ** ((index + 0.5) / 1000 - 15)) if index else 0.0


@dataclass(frozen=True)
class Comparison:
    kl_mean: float
    kl_p999: float
    top1_agreement: float
    nll_diff: float
    nll_diff_stderr: float
    other_ppl: float
    other_by_position: tuple[Bin, ...]


@dataclass(frozen=True)
class Score:
    tokens: int
    bytes: int
    nll: float
    nll_stderr: float
    seconds: float
    context: int | None
    start_token: int | None
    by_position: tuple[Bin, ...]
    comparison: Comparison | None = None

    @property
    def ppl(self) -> float:
        return math.exp(min(self.nll, 700.0))

    @property
    def ppl_stderr(self) -> float:
        """By the delta method: ppl · stderr(nll)."""
        return self.ppl * self.nll_stderr

    @property
    def bits_per_byte(self) -> float:
        return self.nll * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Every figure, a `Bin` as a list of its fields; NaN, which JSON lacks, as null."""
        values: dict[str, Any] = {
            "tokens": self.tokens, "bytes": self.bytes, "nll": self.nll, "nll_stderr": self.nll_stderr,
            "ppl": self.ppl, "ppl_stderr": self.ppl_stderr, "bits_per_byte": self.bits_per_byte,
            "context": self.context, "start_token": self.start_token, "tokens_per_second": self.tokens_per_second,
            "by_position": self.by_position,
        }  # fmt: skip
        if self.comparison is not None:
            values |= vars(self.comparison)
        return {key: _without_nan(value) for key, value in values.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


class Scorer:
    """Scores one file with one model, or with two on the same tokens."""

    def __init__(
        self, model: LanguageModel, other: LanguageModel | None, context: int | None, start_token: int | None,
        limit: int | None,
    ) -> None:  # fmt: skip
        self.models = [model] if other is None else [model, other]
        self.context, self.start_token, self.limit = context, start_token, limit
        self.nll, self.other_nll, self.difference, self.same = Mean(), Mean(), Mean(), Mean()
        self.kl, self.kl_high = Mean(), Quantile()
        self.by_position, self.other_by_position = ByPosition(), ByPosition()
        self.bytes = 0
        self.seconds = 1e-9

    def run(self, file: Path, progress: Callable[[float, Score], object]) -> Score:
        """Score `file`. Raises TokenizerError where it is empty, too short, or not what the tokenizer takes."""
        size = max(file.stat().st_size, 1)
        states = [model.new_state() for model in self.models]
        last = self.start_token  # what the next token is predicted from
        since_reset = 0
        read = 0
        begin = time.perf_counter()
        step = max(1, min(CHUNK, _LOGITS // self.models[0].config.vocab))
        try:
            for ids, widths in self._pieces(file):
                at = 0
                while at < len(ids):
                    if self.context is not None and since_reset == self.context:
                        states = [model.new_state() for model in self.models]
                        last, since_reset = self.start_token, 0
                    room = step if self.context is None else min(step, self.context - since_reset)
                    targets = ids[at : at + room]
                    position = since_reset + 1
                    since_reset += len(targets)
                    bytes_ = widths[at : at + room]
                    at += len(targets)
                    read += int(bytes_.sum())
                    if last is None:  # no start token: the first one is read, not scored
                        last, targets, bytes_, position = int(targets[0]), targets[1:], bytes_[1:], position + 1
                    if len(targets):
                        self._score(np.concatenate([[last], targets[:-1]]), targets, states, position)
                        self.bytes += int(bytes_.sum())
                        last = int(targets[-1])
                    self.seconds = time.perf_counter() - begin
                    progress(min(1.0, read / size), self._result())
        except TokenizerError as error:
            raise TokenizerError(f"{file}: {error}") from None
        if read == 0:
            raise TokenizerError(f"{file}: is empty, so there is nothing to score")
        if self.nll.count == 0:
            raise TokenizerError(
                f"{file}: nothing to score, since without a start token the first token of a context is only read"
            )
        return self._result()

    def _pieces(self, file: Path) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Ids of the file and how many bytes each stands for, up to the limit."""
        left = self.limit
        with file.open("rb") as stream:
            blocks = iter(lambda: stream.read(_BLOCK), b"")
            for piece in self.models[0].text_tokenizer.encode_blocks(blocks):
                ids, widths = np.array(piece.ids, np.int64), np.diff(piece.ends, prepend=0)
                if left is not None:
                    ids, widths = ids[:left], widths[:left]
                    left -= len(ids)
                yield ids, widths
                if left == 0:
                    return

    def _score(self, inputs: NDArray[np.int64], targets: NDArray[np.int64], states: list[Any], position: int) -> None:
        if len(self.models) == 1:
            nll = self.models[0].losses(inputs, targets, states[0])
        else:
            nll, other, kl, same = compare(self.models, inputs, targets, states)
            check_finite(self.models[1], other)
            self.other_nll.add(other)
            self.other_by_position.add(position, other)
            self.difference.add(nll - other)
            self.kl.add(kl)
            self.kl_high.add(kl)
            self.same.add(same.astype(np.float64))
        check_finite(self.models[0], nll)
        self.nll.add(nll)
        self.by_position.add(position, nll)

    def _result(self) -> Score:
        comparison = None
        if self.other_nll.count:
            comparison = Comparison(
                self.kl.mean, self.kl_high.at(0.999), self.same.mean, self.difference.mean, self.difference.stderr,
                math.exp(min(self.other_nll.mean, 700.0)), self.other_by_position.bins(),
            )  # fmt: skip
        return Score(
            self.nll.count, self.bytes, self.nll.mean, self.nll.stderr, self.seconds, self.context, self.start_token,
            self.by_position.bins(), comparison,
        )  # fmt: skip


def compare(
    models: Sequence[LanguageModel], inputs: NDArray[np.int64], targets: NDArray[np.int64], states: Sequence[State]
) -> list[NDArray[Any]]:
    """Of two models on the same tokens: losses of both, KL of the first from the second, whether their maxima agree."""
    logits = [m.advance(inputs, s, all_logits=True) for m, s in zip(models, states, strict=True)]
    rows, V = Count(CHUNK), models[0].config.vocab
    p, q = InputMatrix(rows, V, name="p"), InputMatrix(rows, V, name="q")
    goals = Input("targets", (rows,), "I64")
    ops = Program(p, q, goals)
    results = [ops.add(CrossEntropy(each, goals)) for each in (p, q)]
    kl, same = ops.add(Divergence(q, p))
    results += [kl, same]
    for result in results:
        ops.keep(result)
    executable = models[0].backend.compile(ops, models[0].threads)
    executable.run({"p": logits[0], "q": logits[1], "targets": targets})
    return [executable.read(result)[:, 0] for result in results]
