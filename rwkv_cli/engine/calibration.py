"""Calibration: what a model multiplies on a text tells how to round it, and how far it then is from its source."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.bars import MEASURING, Bars
from rwkv_cli.engine.encodings import utf8_blocks
from rwkv_cli.engine.rounding import Loss, Plain
from rwkv_cli.engine.scoring import compare, rows_together
from rwkv_cli.engine.tokenizer import Tokenizer
from rwkv_cli.errors import TokenizerError
from rwkv_cli.kernels.cpu.feedback import Feedback
from rwkv_cli.kernels.cpu.gram import add_products
from rwkv_cli.models import Model, State
from rwkv_cli.models.base import chunks
from rwkv_cli.models.layerwise import Layerwise
from rwkv_cli.quant import Checkpoint, check_regular
from rwkv_cli.quant.formats.packed import PackedFormat
from rwkv_cli.quant.writer import Planned

_TEXTS = 16
"""Texts that a model writes side by side, so that nothing depends on one beginning."""
_HELD_OUT, _LEAST_HELD_OUT = 0.1, 256
"""The share of the tokens at the end that only measure, and the least number of these."""
_BYTES = 1 << 20
"""The most bytes of a text that are read. They have more tokens than are asked for in any language."""
_TOGETHER = 1000
"""Rows whose products are summed up in one step."""

USUAL_KL = {"int8": 2e-5, "q6": 1e-4, "q5": 4e-4, "q4": 1.2e-3}
"""The usual cost of a format in nats a token: the KL to float of a trained RWKV-7 (docs/quantization.md)."""
_ALARMING = 25
"""Times the usual KL from which a model is called damaged."""


@dataclass(frozen=True)
class Text:
    """The tokens that a conversion is calibrated on."""

    ids: NDArray[np.int64]
    origin: str
    """`self`, or the name of a file."""

    @property
    def held_out(self) -> int:
        """The number of tokens at the end that only measure."""
        return min(max(int(len(self.ids) * _HELD_OUT), _LEAST_HELD_OUT), len(self.ids) // 2)

    @property
    def learned(self) -> NDArray[np.int64]:
        """The tokens that rounding is fitted to."""
        return self.ids[: len(self.ids) - self.held_out]


def own_text(model: Model, start: int, tokens: int, progress: Callable[[int], object]) -> Text:
    """So many tokens that the model writes itself at temperature 1, from token `start`: the same ones every time."""
    random = np.random.Generator(np.random.PCG64(0))
    state = State.stack([model.new_state()] * _TEXTS)
    rows = [np.full(_TEXTS, start, np.int64)]
    for _ in range(-(-tokens // _TEXTS) - 1):
        logits = model.advance_batch(list(rows[-1][:, None]), state).astype(np.float64)
        upto = np.cumsum(np.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)
        marks = random.random(_TEXTS) * upto[:, -1]
        rows.append(np.array([np.searchsorted(*pair, side="right") for pair in zip(upto, marks, strict=True)]))
        progress(_TEXTS)
    return Text(np.stack(rows, axis=1).reshape(-1), "self")


def read_text(path: Path, tokenizer: Tokenizer | None, most: int) -> Text:
    """At most so many tokens of the beginning of a file. Raises TokenizerError for too short a one, and OSError."""
    if tokenizer is None:
        raise TokenizerError(
            f"--calibrate {path}: the model has no tokenizer to read a text with; give --calibrate self"
        )
    check_regular(path)
    with path.open("rb") as file:
        text = b"".join(utf8_blocks([file.read(_BYTES)]))
    try:
        ids = np.array(tokenizer.encode(text.decode(errors="ignore"))[:most], np.int64)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None
    if len(ids) < 2 * _LEAST_HELD_OUT:
        raise TokenizerError(f"{path}: has only {len(ids)} tokens; to calibrate takes {2 * _LEAST_HELD_OUT} or more")
    return Text(ids, path.name)


class Calibrated(Plain):
    """Rounding with feedback: each matrix is fitted to what the source's model multiplies by it."""

    def __init__(self, model: Model, text: Text, effects: Mapping[str, float], bar: Bars) -> None:
        super().__init__(effects)
        self.model, self.text, self._bar = model, text, bar
        self._way = Layerwise(model, text.learned)
        self._products = Products()
        self._feedback: dict[str, Feedback] = {}

    def quantizer(self, planned: Planned) -> Any:
        """The kernel for a tensor. Tables are read and multiply nothing, so theirs is the plain one."""
        name = planned.name
        while name not in self._products and self._way.done < self._layers(name):
            self._feedback.clear()
            self._products = Products()
            self._way.advance(self._products.add)
        if name == "head.weight":
            self._feedback.clear()
            self._products = Products()
            self._way.outputs(self._products.add)
        if name not in self._products:
            return super().quantizer(planned)
        feedback = self._feedback[name] = self._products.feedback(name)
        format = planned.format
        if isinstance(format, PackedFormat):
            return functools.partial(feedback.pack_rows, bits=format.bits)
        return feedback.quantize_rows

    def _layers(self, name: str) -> int:
        """The number of layers that have run when a tensor's inputs are known."""
        if name == "head.weight":
            return self.model.config.layers
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0

    def effect(self, planned: Planned) -> float | None:
        """The relative error of what a matrix computes on the text."""
        feedback = self._feedback.pop(planned.name, None)
        return feedback.effect if feedback else super().effect(planned)

    def measured(self, part: Path) -> Mapping[str, Any]:
        """The loss on the part of the text that is held out."""
        held_out = self.text.ids[len(self.text.learned) :]
        with self._bar(MEASURING, len(held_out)) as progress:
            self.loss = loss(Model(Checkpoint(part)), self.model, held_out, progress)
        kl, top1 = (float(f"{value:.4g}") for value in self.loss)
        return {"calibration": facts(self.text) | {"kl": kl, "top1": top1}}


def facts(text: Text) -> dict[str, Any]:
    """The metadata of a calibration, with the widest numbers in place of what is measured at the end."""
    widest = -1.234e-300
    return {"text": text.origin, "tokens": len(text.ids), "held_out": text.held_out, "kl": widest, "top1": widest}


class Products:
    """XᵀX of the inputs X of some matrices. Matrices with the same inputs share one."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sum] = {}
        """By the name of each matrix."""

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def add(self, names: Sequence[str], rows: NDArray[np.float32]) -> None:
        """Add rows that all these matrices multiply."""
        if names[0] not in self._sums:
            self._sums |= dict.fromkeys(names, _Sum(rows.shape[1]))
        self._sums[names[0]].add(rows)

    def feedback(self, name: str) -> Feedback:
        """The rounding of a matrix, whose products are given up: they are copied only for one that shares them."""
        own = self._sums.pop(name)
        products = own.total()
        return Feedback(products.copy() if own in self._sums.values() else products)


class _Sum:
    """XᵀX of rows that come in small blocks, on and above its diagonal: it is symmetric, and rounding reads no more."""

    def __init__(self, columns: int) -> None:
        self._sum = np.zeros((columns, columns), np.float32)
        self._waiting: list[NDArray[np.float32]] = []

    def add(self, rows: NDArray[np.float32]) -> None:
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= _TOGETHER:
            self.total()

    def total(self) -> NDArray[np.float32]:
        """The sum so far, which is not a copy."""
        if self._waiting:
            rows = np.concatenate(self._waiting)
            self._waiting.clear()
            add_products(self._sum, rows)
        return self._sum


def loss(model: Model, source: Model, ids: NDArray[np.int64], progress: Callable[[int], object]) -> Loss:
    """The difference of a model from its source on a text of two tokens or more."""
    models = [model, source]
    states = [each.new_state() for each in models]
    kl, same = [], []
    for part in chunks(len(ids) - 1, rows_together(model)):
        _, _, each_kl, each_same = compare(models, ids[:-1][part], ids[1:][part], states)
        kl.append(each_kl)
        same.append(each_same)
        progress(part.stop - part.start)
    return Loss(float(np.concatenate(kl).mean()), float(np.concatenate(same).mean()))


def coarsest(plan: Sequence[Planned]) -> str | None:
    """The format of the fewest bits in a plan; None where nothing is rounded."""
    return max({planned.format.NAME for planned in plan} & USUAL_KL.keys(), key=USUAL_KL.__getitem__, default=None)


def alarming(loss: Loss, format: str) -> bool:
    """True if a format has cost far more than it usually does."""
    return not loss.kl < _ALARMING * USUAL_KL[format]


def first_token(ends: Collection[int]) -> int:
    """The token that a text of one's own begins after: one that ends a text, as between the texts of training."""
    return min(ends, default=0)
