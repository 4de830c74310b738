"""RWKV-6 "Finch" (arXiv 2404.05892; rwkv package 0.8.32, model.py, `att_one_v6_0`)."""

from collections.abc import Callable

from rwkv_cli.kernels.backend import Backend, Starts
from rwkv_cli.models.config import Array, Config, Entry, Shape, Shapes, low_rank, matrix, norm
from rwkv_cli.models.layers import (
    Carry,
    Layer,
    gated_channel_mix,
    gated_channel_mix_entries,
    matrix_state,
    tuned_state,
)

MIXES = "wkvrg"
"""The order of the five mixes inside time_maa_w1 and time_maa_w2."""


def configure(shapes: Shapes) -> tuple[str, int, int, dict[str, int]]:
    """Version, heads, head size and low ranks."""
    H, N = shapes["blocks.0.att.time_faaaa"]
    mix = shapes["blocks.0.att.time_maa_w1"][1] // len(MIXES)
    return "6", H, N, {"mix": mix, "decay": shapes["blocks.0.att.time_decay_w1"][1]}


def _slice(index: int) -> Callable[[Array], Array]:
    return lambda a: a[index].T


def entries(c: Config) -> list[Entry]:
    D, H, N = c.width, c.heads, c.head_size
    mix, decay = c.ranks["mix"], c.ranks["decay"]
    return [
        *(Entry(f"att.time_maa_{x}", "vector", (1, D)) for x in "xwkvrg"),
        low_rank("att.time_maa_w1", 5 * mix, D),
        *(
            Entry(f"att.time_maa_w2.{x}", "matrix", (D, mix), "att.time_maa_w2", (5, mix, D), _slice(i))
            for i, x in enumerate(MIXES)
        ),
        Entry("att.time_decay", "vector", (1, D)),
        low_rank("att.time_decay_w1", decay, D),
        low_rank("att.time_decay_w2", D, decay),
        Entry("att.time_faaaa", "vector", (H, N)),
        tuned_state(c, transposed=True),
        *(matrix(f"att.{x}", D, D) for x in ("receptance", "key", "value", "gate", "output")),
        *norm("att.ln_x", D),
        *(Entry(f"ffn.time_maa_{x}", "vector", (1, D)) for x in "kr"),
        *gated_channel_mix_entries(c),
    ]


def wkv_state(c: Config) -> tuple[Shape, tuple[float, ...]]:
    """S as [key, value]."""
    return matrix_state(c), (0.0,)


def time_mix(
    ops: Backend, c: Config, p: Layer, x: Array, delta: Array, starts: Starts, state: Array, carry: Carry  # noqa: ARG001
) -> Array:  # fmt: skip
    base = ops.linear(ops.lerp(x, delta, p["att.time_maa_x"]), p["att.time_maa_w1"], "tanh")
    mixed = {}
    for name, part in zip(MIXES, ops.split(base, len(MIXES)), strict=True):
        mix = ops.linear(part, p[f"att.time_maa_w2.{name}"])
        ops.add(mix, p[f"att.time_maa_{name}"])
        mixed[name] = ops.lerp(x, delta, mix)
    w = ops.linear(ops.linear(mixed["w"], p["att.time_decay_w1"], "tanh"), p["att.time_decay_w2"])
    ops.add(w, p["att.time_decay"])
    ops.decay(w)
    r = ops.linear(mixed["r"], p["att.receptance.weight"])
    k = ops.linear(mixed["k"], p["att.key.weight"])
    v = ops.linear(mixed["v"], p["att.value.weight"])
    y = ops.wkv6(r, k, v, w, p["att.time_faaaa"], starts, state)
    ops.group_norm(y, p["att.ln_x.weight"], p["att.ln_x.bias"], c.heads, c.group_norm_eps)
    ops.multiply(y, ops.linear(mixed["g"], p["att.gate.weight"], "silu"))
    return ops.linear(y, p["att.output.weight"])


def channel_mix(ops: Backend, p: Layer, x: Array, delta: Array) -> Array:
    return gated_channel_mix(ops, p, x, delta, "ffn.time_maa_")
