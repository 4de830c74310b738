"""Perplexity of a text, and the difference of two models on it, in constant memory."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.encodings import utf8_blocks
from rwkv_cli.engine.model import LanguageModel, check_finite, obey
from rwkv_cli.errors import TokenizerError
from rwkv_cli.kernels.contract import Loadable
from rwkv_cli.kernels.program import Count, CrossEntropy, Divergence, Input, InputMatrix, Program, Value
from rwkv_cli.models import Model, State
from rwkv_cli.models.base import chunks

_BLOCK = 1 << 16
"""Bytes of the file that are encoded together."""

_LOGITS = 16 << 20
"""The most logits of one model that are held at once."""


@dataclass
class Mean:
    """A running mean and its standard error (Welford, merged by blocks)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        """Add values to the mean."""
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
        """Standard error of the mean, for independent values. NaN for fewer than two."""
        return math.sqrt(self.squares / (self.count - 1) / self.count) if self.count > 1 else math.nan


_ENDS = np.unique(np.rint(2.0 ** (np.arange(124) / 2)).astype(np.int64))
"""Last positions of the bins: two an octave, one of them at the power of two, where most contexts end."""


class Bin(NamedTuple):
    """NLL of the tokens at positions `first` to `last` (both included) of their contexts."""

    first: int
    last: int
    tokens: int
    nll: float
    stderr: float


class ByPosition:
    """NLL by a token's position in its context. The first position is 1."""

    def __init__(self) -> None:
        self.means = [Mean() for _ in _ENDS]
        self.last = 0

    def add(self, first: int, nll: NDArray[np.float64]) -> None:
        """Add the NLL of consecutive tokens, the first of them at position `first`."""
        stop = first + len(nll)
        start, end = np.searchsorted(_ENDS, [first, stop])
        for mean, values in zip(self.means[start:], np.split(nll, _ENDS[start:end] + 1 - first), strict=False):
            mean.add(values)
        self.last = max(self.last, stop - 1)

    def bins(self) -> tuple[Bin, ...]:
        """Return the bins that have tokens, in order."""
        firsts, lasts = [1, *(_ENDS[:-1] + 1).tolist()], _ENDS.tolist()
        return tuple(
            Bin(first, min(last, self.last), mean.count, mean.mean, mean.stderr)
            for first, last, mean in zip(firsts, lasts, self.means, strict=True)
            if mean.count
        )


@dataclass
class Quantile:
    """High quantiles of non-negative numbers. They come from a histogram of 1,000 bins a decade, exact to 0.3 %."""

    bins: NDArray[np.int64] = field(default_factory=lambda: np.zeros(18_000, np.int64))

    def add(self, values: NDArray[np.float64]) -> None:
        """Add values to the histogram."""
        position = (np.log10(np.maximum(values, 1e-15)) + 15) * 1000
        np.add.at(self.bins, np.clip(position.astype(np.int64), 0, len(self.bins) - 1), 1)

    def at(self, share: float) -> float:
        """Return the value that `share` of the numbers do not exceed, or 0 if it is within rounding of 0."""
        rank = math.ceil(share * int(self.bins.sum()))
        index = int(np.searchsorted(np.cumsum(self.bins), rank))
        return float(10 ** ((index + 0.5) / 1000 - 15)) if index else 0.0


@dataclass(frozen=True)
class Comparison:
    """The difference of a model from the other one, on the same tokens."""

    kl_mean: float
    kl_p999: float
    top1_agreement: float
    nll_diff: float
    nll_diff_stderr: float
    other_ppl: float
    other_by_position: tuple[Bin, ...]


@dataclass(frozen=True)
class Score:
    """The figures of one text."""

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
        """Perplexity, the exponential of the NLL."""
        return math.exp(min(self.nll, 700.0))

    @property
    def ppl_stderr(self) -> float:
        """Standard error by the delta method: ppl · stderr(nll)."""
        return self.ppl * self.nll_stderr

    @property
    def bits_per_byte(self) -> float:
        """NLL in bits for each byte of the text."""
        return self.nll * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Speed of the scoring."""
        return self.tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Return every figure. A `Bin` is a list of its fields, and NaN is null, as JSON lacks it."""
        values: dict[str, Any] = {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "nll": self.nll,
            "nll_stderr": self.nll_stderr,
            "ppl": self.ppl,
            "ppl_stderr": self.ppl_stderr,
            "bits_per_byte": self.bits_per_byte,
            "context": self.context,
            "start_token": self.start_token,
            "tokens_per_second": self.tokens_per_second,
            "by_position": self.by_position,
        }
        if self.comparison is not None:
            values |= vars(self.comparison)
        return {key: _without_nan(value) for key, value in values.items()}


def _without_nan(value: Any) -> Any:
    """Return a value for JSON, None in place of NaN."""
    if isinstance(value, tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


class Scorer:
    """The scoring of one file with one model, or with two on the same tokens."""

    def __init__(
        self,
        model: LanguageModel,
        other: LanguageModel | None = None,
        *,
        start_token: int | None,
        context: int | None = None,
        limit: int | None = None,
    ) -> None:
        """Prepare to score up to `limit` tokens, in contexts of `context` tokens that each begin after `start_token`.

        Without a start token the first token of a context is only read.
        """
        self.model, self.other = model, other
        self.models = [model] if other is None else [model, other]
        self.context, self.start_token, self.limit = context, start_token, limit
        self.nll, self.other_nll, self.difference, self.same = Mean(), Mean(), Mean(), Mean()
        self.kl, self.kl_high = Mean(), Quantile()
        self.by_position, self.other_by_position = ByPosition(), ByPosition()
        self.bytes = 0
        self.seconds = 1e-9
        self.carriage_returns = self.zeros = False
        """True if the text has line breaks of Windows, and if it has NUL characters. Both are scored as they are."""

    def score(self, file: Path, progress: Callable[[float, Score], object]) -> Score:
        """Score a file as `score_stream` does."""
        with file.open("rb") as stream:
            return self.score_stream(stream, str(file), os.fstat(stream.fileno()).st_size, progress)

    def score_stream(self, stream: BinaryIO, name: str, size: int, progress: Callable[[float, Score], object]) -> Score:
        """Score the rest of a stream, which errors call `name`.

        Raises TokenizerError where it is empty, too short, or not a text that the tokenizer takes. `progress` is called
        with the share of `size` bytes that is read, and the score so far.
        """
        read = 0
        states, last, position = self._new_context()
        begin = time.perf_counter()
        try:
            for ids, widths in self._chunks(stream):
                if position == self.context:
                    states, last, position = self._new_context()
                read += int(widths.sum())
                end = position + len(ids)
                if last is None:  # without a start token the first one is read and not scored
                    last, ids, widths, position = int(ids[0]), ids[1:], widths[1:], position + 1
                if len(ids):
                    self._add(np.concatenate([[last], ids[:-1]]), ids, states, position + 1)
                    self.bytes += int(widths.sum())
                    last = int(ids[-1])
                position = end
                self.seconds = time.perf_counter() - begin
                progress(min(1.0, read / max(size, 1)), self._result())
        except TokenizerError as error:
            raise TokenizerError(f"{name}: {error}") from None
        if read == 0:
            raise TokenizerError(f"{name}: is empty, so there is nothing to score")
        if self.nll.count == 0:
            raise TokenizerError(
                f"{name}: nothing to score, since without a start token the first token of a context is only read"
            )
        return self._result()

    def _new_context(self) -> tuple[list[State], int | None, int]:
        """Begin a context: its states, the token that the first one is predicted from, and the tokens read of it."""
        return [model.new_state() for model in self.models], self.start_token, 0

    def _chunks(self, stream: BinaryIO) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield the tokens that are scored together, as `_pieces` does. None reach over the end of a context."""
        left = self.context
        most = rows_together(self.model)
        for ids, widths in self._pieces(stream):
            while len(ids):
                count = len(ids) if left is None else min(left, len(ids))
                for part in chunks(count, most):
                    yield ids[part], widths[part]
                ids, widths = ids[count:], widths[count:]
                left = None if left is None else left - count or self.context

    def _pieces(self, stream: BinaryIO) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield ids of the text and how many bytes each stands for, up to the limit."""
        left = self.limit
        for piece in self.model.text_tokenizer.encode_blocks(self._blocks(stream)):
            ids, widths = np.array(piece.ids, np.int64), np.diff(piece.ends, prepend=0)
            if left is not None:
                ids, widths = ids[:left], widths[:left]
                left -= len(ids)
            yield ids, widths
            if left == 0:
                return

    def _blocks(self, stream: BinaryIO) -> Iterator[bytes]:
        """Yield the text in UTF-8, and note what a reader of the figures may want to know of it."""
        for block in utf8_blocks(iter(lambda: stream.read(_BLOCK), b"")):
            self.carriage_returns |= b"\r\n" in block
            self.zeros |= b"\0" in block
            yield block

    def _add(self, inputs: NDArray[np.int64], targets: NDArray[np.int64], states: list[State], position: int) -> None:
        """Score `targets`, the first of them at `position` of its context, and add them to the figures."""
        if self.other is None:
            nll = self.model.losses(inputs, targets, states[0], watch=obey)
        else:
            nll, other, kl, same = compare(self.models, inputs, targets, states)
            check_finite(self.other, other)
            self.other_nll.add(other)
            self.other_by_position.add(position, other)
            self.difference.add(nll - other)
            self.kl.add(kl)
            self.kl_high.add(kl)
            self.same.add(same.astype(np.float64))
        check_finite(self.model, nll)
        self.nll.add(nll)
        self.by_position.add(position, nll)

    def _result(self) -> Score:
        """Return the figures so far."""
        comparison = None
        if self.other_nll.count:
            comparison = Comparison(
                kl_mean=self.kl.mean,
                kl_p999=self.kl_high.at(0.999),
                top1_agreement=self.same.mean,
                nll_diff=self.difference.mean,
                nll_diff_stderr=self.difference.stderr,
                other_ppl=math.exp(min(self.other_nll.mean, 700.0)),
                other_by_position=self.other_by_position.bins(),
            )
        return Score(
            tokens=self.nll.count,
            bytes=self.bytes,
            nll=self.nll.mean,
            nll_stderr=self.nll.stderr,
            seconds=self.seconds,
            context=self.context,
            start_token=self.start_token,
            by_position=self.by_position.bins(),
            comparison=comparison,
        )


def rows_together(model: Model) -> int:
    """The most tokens of a text whose logits [rows, V] are made and held together."""
    return max(1, min(model.backend.chunk, _LOGITS // model.config.vocab))


def compare(
    models: Sequence[Model], inputs: NDArray[np.int64], targets: NDArray[np.int64], states: Sequence[State]
) -> list[NDArray[Any]]:
    """Compare two models on the same tokens: losses of both, KL of the first from the second, agreeing maxima."""
    logits = [m.advance(inputs, s, all_logits=True, watch=obey) for m, s in zip(models, states, strict=True)]
    return differences(models[0], logits, targets)


def differences(model: Model, logits: Sequence[NDArray[np.float32]], targets: NDArray[np.int64]) -> list[NDArray[Any]]:
    """The results of `compare` for two logits and the same targets, computed where `model` is."""
    program, results = _comparison(len(targets), model.config.vocab)
    executable = model.backend.compile(program, model.threads)
    executable.run({"p": logits[0], "q": logits[1], "targets": targets})
    return [executable.read(result)[:, 0] for result in results]


def comparing_kernels(models: Sequence[Model]) -> list[Loadable]:
    """The kernels of `compare`."""
    first = models[0]
    program, _ = _comparison(1, first.config.vocab)
    passes = [kernel for model in models for kernel in model.kernels("every")]
    return [*passes, *first.backend.kernels(program, first.threads)]


def _comparison(most: int, V: int) -> tuple[Program, list[Value]]:
    """A program over logits p and q and over targets, and what it computes: see `compare`."""
    rows = Count(most)
    p, q = InputMatrix(rows, V, name="p"), InputMatrix(rows, V, name="q")
    goals = Input("targets", (rows,), "I64")
    ops = Program(p, q, goals)
    results = [ops.add(CrossEntropy(each, goals)) for each in (p, q)]
    kl, same = ops.add(Divergence(q, p))
    results += [kl, same]
    for result in results:
        ops.keep(result)
    return ops, results
