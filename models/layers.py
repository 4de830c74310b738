"""Pieces that several versions share."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.program import (
    AddGated,
    Input,
    LayerState,
    Lerp,
    Norm,
    Product,
    Program,
    Value,
)
from rwkv_cli.models.config import Config, Entry, Shape, matrix

Layer = Mapping[str, Any]
"""A layer's tensors by their names in the converted file, `blocks.i.` left out, as the backend keeps them."""

Carry = dict[str, Value]
"""Values that layers hand on to later layers within one forward pass."""


@dataclass(frozen=True)
class TimeMixing:
    """Everything that the time mixing of one layer reads and changes."""

    ops: Program
    config: Config
    weights: Layer
    x: Value
    """The residual stream, to which the result is added."""
    normed: Value
    delta: Value
    """The token shift of `normed`."""
    starts: Input
    state: LayerState
    carry: Carry


@dataclass(frozen=True)
class ChannelMixing:
    """Everything that the channel mixing of one layer reads and changes."""

    ops: Program
    config: Config
    weights: Layer
    x: Value
    """The residual stream, to which the result is added."""
    normed: Value
    delta: Value
    """The token shift of `normed`."""
    ids: Input
    embed: Callable[[], Value]
    """A function that computes the embedding of each token once more, as it was before the first layer."""
    carry: Carry


def exp(a: NDArray[np.float32]) -> NDArray[np.float32]:
    """e^a through float64, whose rounding to float32 does not depend on the CPU."""
    return np.exp(a.astype(np.float64)).astype(np.float32)


def mix_of_current(name: str, width: int) -> Entry:
    """`time_mix_*` of v4 and v5 weighs the current token: stored as 1 − it, to weigh the shift as v6 and v7 do."""
    return Entry(name, "vector", (1, width), derive=lambda a: 1 - a.reshape(1, width))


def lerps(p: Layer, x: Value, delta: Value, prefix: str, letters: str) -> Iterator[Lerp]:
    """x + delta ∘ mix for the mixes of these letters."""
    return (Lerp(x, delta, p[prefix + letter]) for letter in letters)


def norm_of(p: Layer, name: str, eps: float) -> Norm:
    """The norm of this name."""
    return Norm(p[name + ".weight"], p[name + ".bias"], eps)


def gated_channel_mix(m: ChannelMixing, prefix: str) -> None:
    """v4, v5, v6: x += σ(R·f_r) ∘ V·relu(K·f_k)². The names of the two mixes begin with `prefix`."""
    ops, p = m.ops, m.weights
    f_k, f_r = lerps(p, m.normed, m.delta, prefix, "kr")
    key = Product(f_k, p["ffn.key.weight"], "relu_squared")
    receptance = Product(f_r, p["ffn.receptance.weight"], "sigmoid")
    k, gate = ops.linear(key, receptance)
    (out,) = ops.linear(Product(k, p["ffn.value.weight"]))
    ops.add(AddGated(m.x, out, gate))


def gated_channel_mix_entries(c: Config) -> list[Entry]:
    """The matrices of `gated_channel_mix`."""
    return [
        matrix("ffn.key", c.ffn, c.width),
        matrix("ffn.value", c.width, c.ffn, "sparse"),
        matrix("ffn.receptance", c.width, c.width),
    ]


def matrix_state(c: Config) -> Shape:
    """v5 to v7: one N × N matrix a head, as [key, value]."""
    return (c.heads, c.head_size, c.head_size)


def tuned_state(c: Config) -> Entry:
    """A tuned initial state merged into the checkpoint: [value, key] officially."""
    shape = matrix_state(c)
    return Entry("att.time_state", "vector", shape, derive=lambda a: a.reshape(shape).transpose(0, 2, 1), optional=True)
