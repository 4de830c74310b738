"""Tensors that stay float.

| layout | dtype        | for                                     |
|--------|--------------|-----------------------------------------|
| float  | the source's | matrices and tables with `--quant none` |
| vector | F32          | norms, mixes, decay, bonus              |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import FormatError
from rwkv_cli.numbers import FLOAT_DTYPES
from rwkv_cli.quant.dtypes import from_float32, to_float32
from rwkv_cli.quant.formats.contract import Encoded, Facts, Kind, Part, Shape, Spec, StoredArray

NAME = "float"
QUANTIZED = False
LAYOUTS: Mapping[Kind, str] = {"matrix": "float", "sparse": "float", "table": "float", "vector": "vector"}
SUFFIXES: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Floats:
    """A float tensor as its bits."""

    layout: str
    dtype: str
    """One of FLOAT_DTYPES."""
    bits: NDArray[Any]
    """float32 for F32, uint16 for F16 and BF16."""
    format: str = field(default=NAME, init=False)

    @property
    def shape(self) -> Shape:
        return self.bits.shape

    def float32(self) -> NDArray[np.float32]:
        """The values of the tensor."""
        return to_float32(self.bits, self.dtype)


def parts(spec: Spec) -> list[Part]:
    """The one array."""
    return [Part("F32" if spec.layout == "vector" else spec.dtype, spec.shape)]


def rows_together(spec: Spec) -> int:
    """One row: none are interleaved."""
    return 1


def facts_of(largest: float) -> dict[str, Any]:
    """Nothing, since floats need no metadata."""
    return {}


def encode(rows: NDArray[np.float32], spec: Spec, facts: Facts, quantizer: Any) -> Encoded:
    """The bits of the rows, exact: conversion only moves the values of a matrix about."""
    (part,) = parts(spec)
    return Encoded([from_float32(rows, part.dtype)], 0.0)


def accepts(spec: Spec, facts: Facts) -> bool:
    """Return true for any shape."""
    return True


def read(spec: Spec, facts: Facts, arrays: Sequence[StoredArray]) -> Floats:
    """The tensor in its one array, which is not copied."""
    (array,) = arrays
    if array.bits.shape != spec.shape or array.dtype not in FLOAT_DTYPES:
        raise FormatError(f"is stored as {array.dtype} {array.bits.shape}")
    return Floats(spec.layout, array.dtype, array.bits)
