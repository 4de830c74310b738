"""RWKV-4 (arXiv 2305.13048; rwkv package 0.8.32, model.py, `att_one`)."""

from rwkv_cli.kernels.program import AddLinear, Product, Wkv4
from rwkv_cli.models.config import Config, Dimensions, Entry, Shapes, WkvState, matrix
from rwkv_cli.models.layers import (
    ChannelMixing,
    TimeMixing,
    exp,
    gated_channel_mix,
    gated_channel_mix_entries,
    lerps,
    mix_of_current,
)

EMPTY = -1e30
"""The running maximum before the first token, where zero would be wrong."""

ROUNDS_EMBEDDING = True
"""The embedding is rounded to the source's dtype after its norm."""

UNUSED_IN_FIRST: frozenset[str] = frozenset()
"""Layer 0 uses all tensors."""


def configure(shapes: Shapes) -> Dimensions:
    """The dimensions of RWKV-4. Each channel is a head of its own, so one head stands for all."""
    _, width = shapes["emb.weight"]
    return Dimensions("4", heads=1, head_size=width, ranks={})


def entries(c: Config) -> list[Entry]:
    """The tensors of a layer, its two norms left out."""
    D = c.width
    return [
        Entry("att.time_decay", "vector", (D,), derive=lambda a: -exp(a)),
        Entry("att.time_first", "vector", (D,)),
        *(mix_of_current(f"att.time_mix_{x}", D) for x in "kvr"),
        *(matrix(f"att.{x}", D, D) for x in ("receptance", "key", "value", "output")),
        *(mix_of_current(f"ffn.time_mix_{x}", D) for x in "kr"),
        *gated_channel_mix_entries(c),
    ]


def wkv_state(c: Config) -> WkvState:
    """Numerator, denominator and maximum of each channel."""
    return WkvState((3, c.width), (0.0, 0.0, EMPTY))


def time_mix(m: TimeMixing) -> None:
    ops, p = m.ops, m.weights
    a_r, a_k, a_v = lerps(p, m.normed, m.delta, "att.time_mix_", "rkv")
    receptance = Product(a_r, p["att.receptance.weight"], "sigmoid")
    key, value = Product(a_k, p["att.key.weight"]), Product(a_v, p["att.value.weight"])
    r, k, v = ops.linear(receptance, key, value)
    wkv = Wkv4(
        receptance=r,
        key=k,
        value=v,
        decay=p["att.time_decay"],
        bonus=p["att.time_first"],
        starts=m.starts,
        state=m.state,
    )
    ops.add(AddLinear(m.x, ops.add(wkv), p["att.output.weight"]))


def channel_mix(m: ChannelMixing) -> None:
    gated_channel_mix(m, "ffn.time_mix_")
