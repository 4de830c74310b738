"""RWKV-5.0, 5.1 and 5.2 "Eagle" (arXiv 2404.05892; rwkv package 0.8.32, model.py, `att_one_v5…`).

They differ in the shape of decay and bonus, which conversion expands to 5.2's, and in 5.0's lack of a gate.
"""

import numpy as np

from rwkv_cli.kernels.backend import Backend, Starts
from rwkv_cli.models.config import Array, Config, Entry, Shape, Shapes, matrix, norm
from rwkv_cli.models.layers import (
    Carry,
    Layer,
    exp,
    gated_channel_mix,
    gated_channel_mix_entries,
    matrix_state,
    mix_of_current,
    tuned_state,
)


def configure(shapes: Shapes) -> tuple[str, int, int, dict[str, int]]:
    """Version, heads, head size and low ranks."""
    decay = shapes["blocks.0.att.time_decay"]
    if "blocks.0.att.gate.weight" not in shapes:
        version = "5.0"
    else:
        version = "5.2" if len(decay) == 2 and decay[1] > 1 else "5.1"
    return version, decay[0], shapes["emb.weight"][1] // max(decay[0], 1), {}


def _gated(c: Config) -> bool:
    return c.version != "5.0"


def entries(c: Config) -> list[Entry]:
    D, H, N = c.width, c.heads, c.head_size
    shared = (H, N) if c.version == "5.2" else (H,)

    def spread(a: Array) -> Array:
        """One value a head, or one a channel, to [H, N]."""
        return np.array(np.broadcast_to(a.reshape(H, -1), (H, N)))

    first = (
        Entry("att.time_first", "vector", (H, N), source_shape=shared, derive=lambda a: spread(exp(a)))
        if c.version == "5.0"
        else Entry("att.time_faaaa", "vector", (H, N), source_shape=shared, derive=spread)
    )
    return [
        Entry(
            "att.time_decay", "vector", (1, D), source_shape=shared,
            derive=lambda a: spread(exp(-exp(a))).reshape(1, D),
        ),
        first,
        tuned_state(c, transposed=True),
        *(mix_of_current(f"att.time_mix_{x}", D) for x in ("kvrg" if _gated(c) else "kvr")),
        *(matrix(f"att.{x}", D, D) for x in ("receptance", "key", "value", "output")),
        *([matrix("att.gate", D, D)] if _gated(c) else []),
        *norm("att.ln_x", D),
        *(mix_of_current(f"ffn.time_mix_{x}", D) for x in "kr"),
        *gated_channel_mix_entries(c),
    ]  # fmt: skip


def wkv_state(c: Config) -> tuple[Shape, tuple[float, ...]]:
    """S as [key, value]."""
    return matrix_state(c), (0.0,)


def time_mix(
    ops: Backend, c: Config, p: Layer, x: Array, delta: Array, starts: Starts, state: Array, carry: Carry  # noqa: ARG001
) -> Array:  # fmt: skip
    r = ops.linear(ops.lerp(x, delta, p["att.time_mix_r"]), p["att.receptance.weight"])
    k = ops.linear(ops.lerp(x, delta, p["att.time_mix_k"]), p["att.key.weight"])
    v = ops.linear(ops.lerp(x, delta, p["att.time_mix_v"]), p["att.value.weight"])
    u = p["att.time_faaaa"] if _gated(c) else p["att.time_first"]
    y = ops.wkv6(r, k, v, p["att.time_decay"], u, starts, state)
    ops.group_norm(y, p["att.ln_x.weight"], p["att.ln_x.bias"], c.heads, c.group_norm_eps)
    if _gated(c):
        ops.multiply(y, ops.linear(ops.lerp(x, delta, p["att.time_mix_g"]), p["att.gate.weight"], "silu"))
    return ops.linear(y, p["att.output.weight"])


def channel_mix(ops: Backend, p: Layer, x: Array, delta: Array) -> Array:
    return gated_channel_mix(ops, p, x, delta, "ffn.time_mix_")
