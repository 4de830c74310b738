"""What a model is, as data: its dimensions, and the tensors it is made of."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.quant.tensor import FLOATS

Array = NDArray[np.float32]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""Shapes of a checkpoint's tensors by their official names."""

Kind = Literal["matrix", "sparse", "table", "vector"]
"""matrix: multiplies a dense input; sparse: one that is mostly zero; table: read by row; vector: stays float."""


@dataclass(frozen=True)
class Config:
    """Dimensions of a model, all found from names and shapes."""

    version: str
    """4, 5.0, 5.1, 5.2, 6 or 7."""
    layers: int
    width: int
    vocab: int
    heads: int
    head_size: int
    ffn: int
    ranks: dict[str, int] = field(default_factory=dict)
    """Of the low-rank pairs (v6, v7), by their letter."""
    embedding_dtype: str = "F32"
    """F32, F16 or BF16: what the embedding is rounded to after its norm. The reference does that norm in the file's own
    dtype before v7 (rwkv package 0.8.32, model.py, "precompute embedding")."""
    norm_eps: float = 1e-5
    group_norm_eps: float = 64e-5
    """1e-5 · 8², since training divides by head_size_divisor 8 before the norm (rwkv package, model.py)."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Config":
        """Raises ValueError where a field is missing, unknown or out of range."""
        if set(value) != {f.name for f in fields(cls)}:
            raise ValueError("the fields are not those of this version")
        config = cls(**value)
        sizes = [config.layers, config.width, config.vocab, config.heads, config.head_size, config.ffn]
        if not isinstance(config.ranks, dict):
            raise ValueError("ranks must be a table")
        if any(type(n) is not int or not 0 < n < 1 << 24 for n in [*sizes, *config.ranks.values()]):
            raise ValueError("a dimension is out of range")
        if config.embedding_dtype not in FLOATS:
            raise ValueError("its embedding_dtype is unknown")
        if config.layers > 9999:
            raise ValueError("it has too many layers")
        if config.heads * config.head_size != config.width:
            raise ValueError("heads · head_size is not the width")
        if not all(isinstance(e, float) and 0 < e < 1 for e in (config.norm_eps, config.group_norm_eps)):
            raise ValueError("an epsilon is out of range")
        return config


@dataclass(frozen=True)
class Entry:
    """One tensor of a model: where it comes from and what it becomes."""

    name: str
    """In the converted file, and the key its layer finds it by: the official name without `blocks.i.`, mostly."""
    kind: Kind
    shape: Shape
    """[out, in] for a matrix."""
    source: str = ""
    """The official name if it differs from `name`."""
    source_shape: Shape = ()
    """The official shape if it differs; dimensions of 1 do not count, but for matrices."""
    derive: Callable[[Array], Array] | None = None
    optional: bool = False

    @property
    def origin(self) -> str:
        return self.source or self.name

    def fits(self, shape: Shape) -> bool:
        """Whether a source tensor of this shape can become this one."""
        expected = self.source_shape or self.shape
        if len(expected) == 2 and self.kind != "vector":
            return shape == expected
        return squeezed(shape) == squeezed(expected) and prod(shape) == prod(expected)


def squeezed(shape: Shape) -> Shape:
    return tuple(n for n in shape if n != 1)


def norm(name: str, width: int) -> list[Entry]:
    """Weight and bias of a layer or group norm."""
    return [Entry(f"{name}.{part}", "vector", (width,)) for part in ("weight", "bias")]


def matrix(name: str, out: int, inputs: int, kind: Kind = "matrix") -> Entry:
    """A linear layer, official orientation [out, in]."""
    return Entry(f"{name}.weight", kind, (out, inputs))


def low_rank(name: str, out: int, inputs: int) -> Entry:
    """A low-rank factor, stored [in, out] officially and applied as x @ W: turned to [out, in]."""
    return Entry(name, "matrix", (out, inputs), source_shape=(inputs, out), derive=np.transpose)
