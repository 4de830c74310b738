"""A model as data: its dimensions, and the tensors that it is made of."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import UnsupportedModelError
from rwkv_cli.numbers import FLOAT_DTYPES
from rwkv_cli.quant.formats.contract import Kind
from rwkv_cli.quant.formats.contract import Shape as Shape

Array = NDArray[np.float32]
Shapes = Mapping[str, Shape]
"""Shapes of a checkpoint's tensors by their official names."""


@dataclass(frozen=True)
class Config:
    """Dimensions of a model.

    Converted files hold them. A field that is added later has a default, so that older files still load.
    """

    version: str
    """One of 4, 5.0, 5.0r2, 5.1, 5.2, 6, 7, 7a and 8-rc00."""
    layers: int
    width: int
    vocab: int
    heads: int
    head_size: int
    ffn: int
    ranks: dict[str, int] = field(default_factory=dict)
    """Ranks of the low-rank pairs of v6 and later, by their letter."""
    embedding_dtype: str = "F32"
    """The dtype that the embedding is rounded to after its norm. Before v7, the reference does that norm in the file's
    own dtype (rwkv package 0.8.32, model.py, "precompute embedding")."""
    embedding_normed: bool = False
    """True if the file's embedding has its norm in it already, so that there is no blocks.0.ln0."""
    ffn_activation: Literal["relu_squared", "silu"] = "relu_squared"
    """The activation between the two matrices of the channel mixing. Only v7 can have another one."""
    norm_eps: float = 1e-5
    output_norm_eps: float | None = None
    """The eps of the norm before the head. None: it is norm_eps."""
    group_norm_eps: float = 64e-5
    """The default is 1e-5 · 8²: training divides by head_size_divisor 8 before the norm (rwkv package, model.py)."""

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON. Rare fields are left out at their defaults, so that older programs read the file too."""
        rare = {
            f.name: f.default
            for f in fields(self)
            if f.name in ("embedding_normed", "ffn_activation", "output_norm_eps")
        }
        return {name: value for name, value in asdict(self).items() if name not in rare or value != rare[name]}

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults. A field that is added later is not among them in older files."""
        plain = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        return {name: value for name, value in self.as_json().items() if plain.get(name, MISSING) != value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Config":
        """The config in a converted file. A field that the file lacks gets its default.

        Raises UnsupportedModelError for an unknown field, and ValueError where one without a default is missing or one
        is out of range.
        """
        known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
        for name in value:
            if name not in known:
                raise UnsupportedModelError(f"its config has a field {name!r:.80} of a newer version; upgrade rwkv-cli")
        for name, required in known.items():
            if required and name not in value:
                raise ValueError(f"the field {name!r} is missing")
        config = cls(**value)
        sizes = [config.layers, config.width, config.vocab, config.heads, config.head_size, config.ffn]
        if not isinstance(config.ranks, dict):
            raise ValueError("ranks must be a table")
        if any(type(n) is not int or not 0 < n < 1 << 24 for n in [*sizes, *config.ranks.values()]):
            raise ValueError("a dimension is out of range")
        if config.embedding_dtype not in FLOAT_DTYPES:
            raise ValueError("its embedding_dtype is unknown")
        if type(config.embedding_normed) is not bool:
            raise ValueError("embedding_normed must be true or false")
        if config.ffn_activation not in ("relu_squared", *(["silu"] if config.version == "7" else [])):
            raise ValueError("its ffn_activation is unknown")
        if config.layers > 9999:
            raise ValueError("it has too many layers")
        if config.heads * config.head_size != config.width:
            raise ValueError("heads · head_size is not the width")
        epsilons = [config.norm_eps, config.group_norm_eps]
        epsilons += [] if config.output_norm_eps is None else [config.output_norm_eps]
        if not all(isinstance(e, float) and 0 < e < 1 for e in epsilons):
            raise ValueError("an epsilon is out of range")
        return config


class Dimensions(NamedTuple):
    """The part of a config that each version finds in its own tensors."""

    version: str
    heads: int
    head_size: int
    ranks: dict[str, int]


class WkvState(NamedTuple):
    """The state that one layer's recurrence keeps of a sequence."""

    shape: Shape
    start: tuple[float, ...]
    """The numbers before the first token: one for all of the state, or one for each item of its first axis."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a model: its origin and what it becomes."""

    name: str
    """The name in the converted file, without `blocks.i.`. It is the official one, but for a few."""
    kind: Kind
    shape: Shape
    """[out, in] for a matrix."""
    source: str = ""
    """The official name if it differs from `name`."""
    source_shape: Shape = ()
    """The official shape if it differs. Dimensions of 1 count only in matrices."""
    derive: Callable[[Array], Array] | None = None
    """A function that makes this tensor of the official one; None leaves the values as they are."""
    optional: bool = False

    @property
    def origin(self) -> str:
        """The official name."""
        return self.source or self.name

    def fits(self, shape: Shape) -> bool:
        """Return true if a source tensor of this shape can become this one."""
        expected = self.source_shape or self.shape
        if len(expected) == 2 and self.kind != "vector":
            return shape == expected
        return squeezed(shape) == squeezed(expected) and prod(shape) == prod(expected)


def squeezed(shape: Shape) -> Shape:
    """The shape without its dimensions of 1."""
    return tuple(n for n in shape if n != 1)


def norm(name: str, width: int) -> list[Entry]:
    """Weight and bias of a layer norm or group norm."""
    return [Entry(f"{name}.{part}", "vector", (width,)) for part in ("weight", "bias")]


def matrix(name: str, out: int, inputs: int, kind: Kind = "matrix") -> Entry:
    """A linear layer, [out, in] as officially."""
    return Entry(f"{name}.weight", kind, (out, inputs))


def low_rank(name: str, out: int, inputs: int) -> Entry:
    """A low-rank factor. Official files have it as [in, out], applied as x @ W; here it is turned to [out, in]."""
    return Entry(name, "matrix", (out, inputs), source_shape=(inputs, out), derive=np.transpose)
