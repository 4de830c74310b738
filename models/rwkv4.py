"""RWKV-4 (arXiv 2305.13048; rwkv package 0.8.32, model.py, `att_one`)."""

from rwkv_cli.kernels.backend import Backend, Starts
from rwkv_cli.models.config import Array, Config, Entry, Shape, Shapes, matrix
from rwkv_cli.models.layers import Carry, Layer, exp, gated_channel_mix, gated_channel_mix_entries, mix_of_current

EMPTY = -1e30
"""The running maximum before the first token; zero would be wrong."""


def configure(shapes: Shapes) -> tuple[str, int, int, dict[str, int]]:
    """Version, heads, head size and low ranks. A channel is a head of its own: one head stands for all."""
    return "4", 1, shapes["emb.weight"][1], {}


def entries(c: Config) -> list[Entry]:
    D = c.width
    return [
        Entry("att.time_decay", "vector", (D,), derive=lambda a: -exp(a)),
        Entry("att.time_first", "vector", (D,)),
        *(mix_of_current(f"att.time_mix_{x}", D) for x in "kvr"),
        *(matrix(f"att.{x}", D, D) for x in ("receptance", "key", "value", "output")),
        *(mix_of_current(f"ffn.time_mix_{x}", D) for x in "kr"),
        *gated_channel_mix_entries(c),
    ]


def wkv_state(c: Config) -> tuple[Shape, tuple[float, ...]]:
    """Numerator, denominator and maximum of each channel, and what each starts with."""
    return (3, c.width), (0.0, 0.0, EMPTY)


def time_mix(
    ops: Backend, c: Config, p: Layer, x: Array, delta: Array, starts: Starts, state: Array, carry: Carry  # noqa: ARG001
) -> Array:  # fmt: skip
    k = ops.linear(ops.lerp(x, delta, p["att.time_mix_k"]), p["att.key.weight"])
    v = ops.linear(ops.lerp(x, delta, p["att.time_mix_v"]), p["att.value.weight"])
    r = ops.linear(ops.lerp(x, delta, p["att.time_mix_r"]), p["att.receptance.weight"], "sigmoid")
    y = ops.wkv4(k, v, p["att.time_decay"], p["att.time_first"], starts, state)
    ops.multiply(y, r)
    return ops.linear(y, p["att.output.weight"])


def channel_mix(ops: Backend, p: Layer, x: Array, delta: Array) -> Array:
    return gated_channel_mix(ops, p, x, delta, "ffn.time_mix_")
