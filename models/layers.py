"""Pieces that several versions share."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rwkv_cli.kernels.backend import Backend
from rwkv_cli.models.config import Array, Config, Entry, Shape, matrix

Layer = Mapping[str, Any]
"""A layer's tensors by their names in the converted file, `blocks.i.` left out, as the backend keeps them."""

Carry = dict[str, Array]
"""What layers hand on to later layers within one forward pass."""


def exp(a: Array) -> Array:
    """e^a through float64, whose rounding to float32 does not depend on the CPU."""
    return np.exp(a.astype(np.float64)).astype(np.float32)


def mix_of_current(name: str, width: int) -> Entry:
    """`time_mix_*` of v4 and v5 weighs the current token: stored as 1 − it, to weigh the shift as v6 and v7 do."""
    return Entry(name, "vector", (1, width), derive=lambda a: 1 - a.reshape(1, width))


def gated_channel_mix(ops: Backend, p: Layer, x: Array, delta: Array, mix: str) -> Array:
    """v4, v5, v6: σ(R·x_r) ∘ V·relu(K·x_k)²; `mix` is the prefix of the two mixes' names."""
    k = ops.linear(ops.lerp(x, delta, p[mix + "k"]), p["ffn.key.weight"], "relu_squared")
    gate = ops.linear(ops.lerp(x, delta, p[mix + "r"]), p["ffn.receptance.weight"], "sigmoid")
    out = ops.linear(k, p["ffn.value.weight"])
    ops.multiply(out, gate)
    return out


def gated_channel_mix_entries(c: Config) -> list[Entry]:
    """Its matrices."""
    return [
        matrix("ffn.key", c.ffn, c.width),
        matrix("ffn.value", c.width, c.ffn, "sparse"),
        matrix("ffn.receptance", c.width, c.width),
    ]


def matrix_state(c: Config) -> Shape:
    """v5 to v7: one N × N matrix a head."""
    return (c.heads, c.head_size, c.head_size)


def tuned_state(c: Config, transposed: bool) -> Entry:
    """A tuned initial state merged into the checkpoint: [value, key] officially; v5 and v6 run on [key, value]."""
    shape = matrix_state(c)
    turn = (lambda a: a.reshape(shape).transpose(0, 2, 1)) if transposed else None
    return Entry("att.time_state", "vector", shape, derive=turn, optional=True)
