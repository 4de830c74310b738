"""The matrices that their format would spoil are kept in more bits.

Some rows of each matrix are rounded plainly, and multiply what the source's model gives the matrix on the beginning of
a text. A matrix is spoilt if its outputs are off by far more than its format usually costs.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.bars import KEEPING, Bars
from rwkv_cli.engine.rounding import off, sample, stored
from rwkv_cli.models import Model
from rwkv_cli.models.layerwise import Layerwise
from rwkv_cli.quant.formats import relaid
from rwkv_cli.quant.writer import Contents, Planned, Written

USUAL_EFFECT = {"int8": 0.002, "q6": 0.007, "q5": 0.015, "q4": 0.025}
"""The most that a format usually costs a matrix of a trained RWKV-7, if it is calibrated: the error of its outputs."""
_SPOILT, _SOUND = 6, 3
"""Times the usual error from which a matrix is spoilt, and up to which int8 in place of its format does.

Plain rounding of trained models gets to 1.5 to 3.5 times."""
_SAMPLE = 64
"""Rows of a matrix that tell what rounding does to all."""


class Kept(NamedTuple):
    """A matrix that its format would spoil."""

    planned: Planned
    """The matrix as it is stored now."""
    format: str
    """The format that it was to have."""
    effect: float
    """The relative error of its outputs in that format."""


def judge(plan: Sequence[Planned], source: Model, ids: NDArray[np.int64], bar: Bars) -> list[Kept]:
    """The matrices that would be spoilt: in int8 if that costs what their format usually does, else as they are.

    `source` is the model with the source's own values. It reads as many ids as it takes in one pass.
    """
    by_name = {planned.name: planned for planned in plan}
    found: list[Kept] = []

    def take(names: Sequence[str], rows: NDArray[np.float32]) -> None:
        found.extend(filter(None, (_judged(by_name[name], rows) for name in names)))

    ids = ids[: source.backend.chunk]
    layers = source.config.layers
    with bar(KEEPING, layers * len(ids)) as progress:
        way = Layerwise(source, ids)
        for _ in range(layers):
            way.advance(take)
            progress(len(ids))
        way.outputs(take)
    return found


def keep(contents: Contents, kept: Sequence[Kept]) -> Contents:
    """The contents with these matrices kept."""
    instead = {each.planned.name: each.planned for each in kept}
    return replace(contents, plan=[instead.get(planned.name, planned) for planned in contents.plan])


def spoilt(written: Sequence[Written]) -> list[Written]:
    """The matrices whose outputs were spoilt although none was expected to be, the worst first."""
    found = [item for item in written if not item.planned.kept and _too_much(item.planned, item.effect or 0)]
    return sorted(found, key=lambda item: -(item.effect or 0))


def _judged(planned: Planned, x: NDArray[np.float32]) -> Kept | None:
    """A matrix that multiplies the rows x, if it is to be kept."""
    if not planned.format.QUANTIZED:
        return None
    rows = sample(planned, _SAMPLE)
    if not np.isfinite(rows).all():
        return None  # the writer refuses such a tensor by its name
    effect = _effect(planned, rows, x)
    if not _too_much(planned, effect):
        return None
    name = planned.format.NAME
    as_int8, as_it_is = (replace(planned, layout=relaid(planned.layout, f), kept=True) for f in ("int8", "none"))
    does = name != "int8" and _effect(as_int8, rows, x) < _SOUND * USUAL_EFFECT[name]
    return Kept(as_int8 if does else as_it_is, name, effect)


def _effect(planned: Planned, rows: NDArray[np.float32], x: NDArray[np.float32]) -> float:
    """The relative error of x · rowsᵀ if the rows are rounded plainly."""
    return off(x @ rows.T, x @ stored(planned, rows).T)


def _too_much(planned: Planned, effect: float) -> bool:
    """True if the outputs of a matrix are off by far more than its format usually costs."""
    return effect > _SPOILT * USUAL_EFFECT.get(planned.format.NAME, math.inf)
