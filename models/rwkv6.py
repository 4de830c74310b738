"""RWKV-6 "Finch" (arXiv 2404.05892; rwkv package 0.8.32, model.py, `att_one_v6_0`)."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.program import AddLinear, Columns, Lerp, Product, Wkv6
from rwkv_cli.models.config import Config, Dimensions, Entry, Shapes, WkvState, low_rank, matrix, norm
from rwkv_cli.models.layers import (
    ChannelMixing,
    TimeMixing,
    gated_channel_mix,
    gated_channel_mix_entries,
    matrix_state,
    norm_of,
    tuned_state,
)

MIXES = "wkvrg"
"""The order of the five mixes inside time_maa_w1 and time_maa_w2."""

ROUNDS_EMBEDDING = True
"""The embedding is rounded to the source's dtype after its norm."""

UNUSED_IN_FIRST: frozenset[str] = frozenset()
"""Layer 0 uses all tensors."""


def configure(shapes: Shapes) -> Dimensions:
    """The dimensions of RWKV-6."""
    H, N = shapes["blocks.0.att.time_faaaa"]
    _, mixes, *_ = shapes["blocks.0.att.time_maa_w1"]
    _, decay, *_ = shapes["blocks.0.att.time_decay_w1"]
    return Dimensions("6", H, N, {"mix": mixes // len(MIXES), "decay": decay})


def _slice(index: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    return lambda a: a[index].T


def entries(c: Config) -> list[Entry]:
    """The tensors of a layer, its two norms left out."""
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
        tuned_state(c),
        *(matrix(f"att.{x}", D, D) for x in ("receptance", "key", "value", "gate", "output")),
        *norm("att.ln_x", D),
        *(Entry(f"ffn.time_maa_{x}", "vector", (1, D)) for x in "kr"),
        *gated_channel_mix_entries(c),
    ]


def wkv_state(c: Config) -> WkvState:
    """One matrix a head."""
    return WkvState(matrix_state(c), (0.0,))


def time_mix(m: TimeMixing) -> None:
    ops, p, a, delta = m.ops, m.weights, m.normed, m.delta
    (low,) = ops.linear(Product(Lerp(a, delta, p["att.time_maa_x"]), p["att.time_maa_w1"], "tanh"))
    rank = low.columns // len(MIXES)
    mixes = ops.linear(
        *(
            Product(Columns(low, i * rank, rank), p[f"att.time_maa_w2.{name}"], bias=p[f"att.time_maa_{name}"])
            for i, name in enumerate(MIXES)
        )
    )
    a_w, a_k, a_v, a_r, a_g = (Lerp(a, delta, mix) for mix in mixes)
    low, r, k, v, gate = ops.linear(
        Product(a_w, p["att.time_decay_w1"], "tanh"),
        Product(a_r, p["att.receptance.weight"]),
        Product(a_k, p["att.key.weight"]),
        Product(a_v, p["att.value.weight"]),
        Product(a_g, p["att.gate.weight"], "silu"),
    )
    (w,) = ops.linear(Product(low, p["att.time_decay_w2"], "decay", p["att.time_decay"]))
    wkv = Wkv6(
        receptance=r,
        key=k,
        value=v,
        decay=w,
        bonus=p["att.time_faaaa"],
        norm=norm_of(p, "att.ln_x", m.config.group_norm_eps),
        gate=gate,
        starts=m.starts,
        state=m.state,
    )
    ops.add(AddLinear(m.x, ops.add(wkv), p["att.output.weight"]))


def channel_mix(m: ChannelMixing) -> None:
    gated_channel_mix(m, "ffn.time_maa_")
