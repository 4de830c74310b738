"""Rounding without a text, and the judgement of an embedding by what its norm makes of the rounding errors."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import Loadable
from rwkv_cli.kernels.cpu import quantize_packed, quantize_weights
from rwkv_cli.models import Config
from rwkv_cli.quant.formats.contract import Encoded, Facts, Format, Spec, StoredArray
from rwkv_cli.quant.formats.packed import PackedFormat
from rwkv_cli.quant.writer import Planned

_SAMPLE = 256
"""Rows of an embedding that tell what rounding does to all."""
_TIMES, _LEAST = 3.0, 0.02
"""An embedding is spoilt where the error after its norm is so many times the error before, and at least so large."""

ROUNDING_KERNELS: Mapping[str, list[Loadable]] = {
    "int8": quantize_weights.KERNELS,
    **dict.fromkeys(("q4", "q5", "q6"), quantize_packed.KERNELS),
}
"""The kernels that round to each format."""


def quantizer_of(format: Format) -> Any:
    """The kernel that rounds rows, as their format calls it."""
    if isinstance(format, PackedFormat):
        return functools.partial(quantize_packed.pack_rows, bits=format.bits)
    return quantize_weights.quantize_rows


class Loss(NamedTuple):
    """The cost of quantizing a model, on text that nothing was fitted to."""

    kl: float
    """The mean KL of the model's predictions from the source's, in nats a token."""
    top1: float
    """The share of tokens at which the likeliest next token is the same."""


class Plain:
    """The rounding of every tensor by itself (`writer.Rounding`)."""

    def __init__(self, effects: Mapping[str, float]) -> None:
        """`effects` are those that are known by the names of tensors."""
        self._effects = effects
        self.loss: Loss | None = None
        """The cost of the conversion, if it is measured."""

    def quantizer(self, planned: Planned) -> Any:
        """The kernel of the tensor's format."""
        return quantizer_of(planned.format)

    def effect(self, planned: Planned) -> float | None:
        """The effect that was known before."""
        return self._effects.get(planned.name)

    def measured(self, part: Path) -> Mapping[str, Any]:  # noqa: ARG002
        """Nothing."""
        return {}


class Judgement(NamedTuple):
    """The relative error that rounding does to an embedding."""

    itself: float
    after_norm: float

    @property
    def spoilt(self) -> bool:
        """True if the model would read another embedding than the table's own error tells."""
        return self.after_norm > max(_LEAST, _TIMES * self.itself)


def judge_embedding(plan: Sequence[Planned], config: Config) -> Judgement | None:
    """The errors of some rows of the embedding; None where it is not rounded or has its norm in it.

    The norm makes small channels as large as its weights say, and their rounding errors with them.
    """
    by_name = {planned.name: planned for planned in plan}
    emb = by_name["emb.weight"]
    if not emb.format.QUANTIZED or config.embedding_normed:
        return None
    rows = sample(emb, _SAMPLE)
    weight = by_name["blocks.0.ln0.weight"].source.float32().reshape(-1)
    if not (np.isfinite(rows).all() and np.isfinite(weight).all()):
        return None  # the writer refuses such a tensor by its name
    kept = stored(emb, rows)
    normed = (_normed(each, weight, config.norm_eps) for each in (rows, kept))
    return Judgement(off(rows, kept), off(*normed))


def off(exact: NDArray[Any], kept: NDArray[Any]) -> float:
    """The relative error of what is kept."""
    return float(np.linalg.norm(kept - exact)) / max(float(np.linalg.norm(exact)), 1e-30)


def sample(planned: Planned, most: int) -> NDArray[np.float32]:
    """At most so many rows of a tensor, from its first to its last."""
    count = planned.shape[0]
    places = np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))
    rows: NDArray[np.float32]
    if planned.derive is None:
        rows = np.concatenate([planned.source.float32(n, n + 1) for n in places])
    else:
        rows = planned.whole()[places]
    return rows


def encoded(planned: Planned, rows: NDArray[np.float32]) -> Encoded:
    """Rows of a tensor, rounded plainly to its format."""
    spec, facts = _alone(planned, rows)
    return planned.format.encode(rows, spec, facts, quantizer_of(planned.format))


def stored(planned: Planned, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows as the format of a tensor keeps them."""
    format, (spec, facts) = planned.format, _alone(planned, rows)
    parts = encoded(planned, rows).parts
    arrays = [StoredArray(part.dtype, array) for part, array in zip(format.parts(spec), parts, strict=True)]
    values: NDArray[np.float32] = format.read(spec, facts, arrays).float32()
    return values


def _alone(planned: Planned, rows: NDArray[np.float32]) -> tuple[Spec, Facts]:
    """The spec and the facts of rows that are a tensor by themselves."""
    facts = planned.format.facts_of(float(np.abs(rows).max()))
    return Spec(planned.layout, rows.shape, planned.spec.dtype), facts


def _normed(rows: NDArray[np.float32], weight: NDArray[np.float32], eps: float) -> NDArray[np.float64]:
    """The layer norm of rows, without its bias, which no rounding changes."""
    wide = rows.astype(np.float64)
    wide -= wide.mean(axis=1, keepdims=True)
    normed: NDArray[np.float64] = wide / np.sqrt(np.square(wide).mean(axis=1, keepdims=True) + eps) * weight
    return normed
