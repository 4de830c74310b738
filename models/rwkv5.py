"""RWKV-5.0, 5.1 and 5.2 "Eagle" (arXiv 2404.05892; rwkv package 0.8.32, model.py, `att_one_v5…`).

They differ in the shape of decay and bonus, which conversion expands to 5.2's, and in 5.0's lack of a gate. 5.0r2 is a
preview of 5.1: it has no gate yet, but 5.1's bonus (RWKV-LM, RWKV-v4neo/src/model.py, "r2" in RWKV_MY_TESTING).
"""

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.program import AddLinear, Product, Wkv6
from rwkv_cli.models.config import Config, Dimensions, Entry, Shapes, WkvState, matrix, norm
from rwkv_cli.models.layers import (
    ChannelMixing,
    TimeMixing,
    exp,
    gated_channel_mix,
    gated_channel_mix_entries,
    lerps,
    matrix_state,
    mix_of_current,
    norm_of,
    tuned_state,
)

ROUNDS_EMBEDDING = True
"""The embedding is rounded to the source's dtype after its norm."""

UNUSED_IN_FIRST: frozenset[str] = frozenset()
"""Layer 0 uses all tensors."""


def configure(shapes: Shapes) -> Dimensions:
    """The dimensions of RWKV-5."""
    heads, *channels = shapes["blocks.0.att.time_decay"]
    _, width = shapes["emb.weight"]
    if "blocks.0.att.gate.weight" not in shapes:
        preview = "blocks.0.att.time_faaaa" in shapes and "blocks.0.att.time_mix_g" not in shapes
        version = "5.0r2" if preview else "5.0"
    else:
        version = "5.2" if len(channels) == 1 and max(channels) > 1 else "5.1"
    return Dimensions(version, heads, head_size=width // max(heads, 1), ranks={})


def _gated(c: Config) -> bool:
    return not c.version.startswith("5.0")


def entries(c: Config) -> list[Entry]:
    """The tensors of a layer, its two norms left out."""
    D, H, N = c.width, c.heads, c.head_size
    shared = (H, N) if c.version == "5.2" else (H,)

    def spread(a: NDArray[np.float32]) -> NDArray[np.float32]:
        """[H, N] of one value a head or of one value a channel."""
        return np.array(np.broadcast_to(a.reshape(H, -1), (H, N)))

    def decay(a: NDArray[np.float32]) -> NDArray[np.float32]:
        """[1, D] of the stored logarithms of −log(decay)."""
        return spread(exp(-exp(a))).reshape(1, D)

    bonus = (
        Entry("att.time_faaaa", "vector", (H, N), source_shape=shared, derive=spread)
        if c.version != "5.0"
        else Entry("att.time_first", "vector", (H, N), source_shape=shared, derive=lambda a: spread(exp(a)))
    )
    return [
        Entry("att.time_decay", "vector", (1, D), source_shape=shared, derive=decay),
        bonus,
        tuned_state(c),
        *(mix_of_current(f"att.time_mix_{x}", D) for x in ("kvrg" if _gated(c) else "kvr")),
        *(matrix(f"att.{x}", D, D) for x in ("receptance", "key", "value", "output")),
        *([matrix("att.gate", D, D)] if _gated(c) else []),
        *norm("att.ln_x", D),
        *(mix_of_current(f"ffn.time_mix_{x}", D) for x in "kr"),
        *gated_channel_mix_entries(c),
    ]


def wkv_state(c: Config) -> WkvState:
    """One matrix a head."""
    return WkvState(matrix_state(c), (0.0,))


def time_mix(m: TimeMixing) -> None:
    ops, p, gated = m.ops, m.weights, _gated(m.config)
    names = ("receptance", "key", "value", "gate") if gated else ("receptance", "key", "value")
    mixed = lerps(p, m.normed, m.delta, "att.time_mix_", "rkvg"[: len(names)])
    products = (
        Product(part, p[f"att.{name}.weight"], "silu" if name == "gate" else "")
        for part, name in zip(mixed, names, strict=True)
    )
    r, k, v, *gate = ops.linear(*products)
    wkv = Wkv6(
        receptance=r,
        key=k,
        value=v,
        decay=p["att.time_decay"],
        bonus=p["att.time_first"] if m.config.version == "5.0" else p["att.time_faaaa"],
        norm=norm_of(p, "att.ln_x", m.config.group_norm_eps),
        gate=gate[0] if gate else None,
        starts=m.starts,
        state=m.state,
    )
    ops.add(AddLinear(m.x, ops.add(wkv), p["att.output.weight"]))


def channel_mix(m: ChannelMixing) -> None:
    gated_channel_mix(m, "ffn.time_mix_")
