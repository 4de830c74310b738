"""Pieces that several versions share."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import Array, Lerp, Norm, Product, Recorder
from rwkv_cli.models.config import Config, Entry, Shape, matrix

Layer = Mapping[str, Any]
"""A layer's tensors by their names in the converted file, `blocks.i.` left out, as the backend keeps them."""

Carry = dict[str, Array]
"""What layers hand on to later layers within one forward pass."""


def exp(a: NDArray[np.float32]) -> NDArray[np.float32]:
    """e^a through float64, whose rounding to float32 does not depend on the CPU."""
    return np.exp(a.astype(np.float64)).astype(np.float32)


def mix_of_current(name: str, width: int) -> Entry:
    """`time_mix_*` of v4 and v5 weighs the current token: stored as 1 − it, to weigh the shift as v6 and v7 do."""
    return Entry(name, "vector", (1, width), derive=lambda a: 1 - a.reshape(1, width))


def lerps(p: Layer, x: Array, delta: Array, prefix: str, letters: str) -> Iterator[Lerp]:
    """x + delta ∘ mix for the mixes of these letters."""
    return (Lerp(x, delta, p[prefix + letter]) for letter in letters)


def norm_of(p: Layer, name: str, eps: float) -> Norm:
    """The norm of this name."""
    return Norm(p[name + ".weight"], p[name + ".bias"], eps)


def gated_channel_mix(ops: Recorder, p: Layer, x: Array, f: Array, delta: Array, mix: str) -> None:
    """v4, v5, v6: x += σ(R·f_r) ∘ V·relu(K·f_k)²; `mix` is the prefix of the two mixes' names."""
    f_k, f_r = lerps(p, f, delta, mix, "kr")
    k, gate = ops.linear(
        Product(f_k, p["ffn.key.weight"], "relu_squared"), Product(f_r, p["ffn.receptance.weight"], "sigmoid")
    )
    (out,) = ops.linear(Product(k, p["ffn.value.weight"]))
    ops.add_gated(x, out, gate)


def gated_channel_mix_entries(c: Config) -> list[Entry]:
    """Its matrices."""
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
