"""RWKV-7 "Goose" (arXiv 2503.14456; RWKV-LM, RWKV-v7/rwkv_v7_numpy.py)."""

from rwkv_cli.kernels.program import AddLinear, Lerp, Product, ValueResidual, Wkv7
from rwkv_cli.models.config import Config, Dimensions, Entry, Shapes, WkvState, low_rank, matrix, norm
from rwkv_cli.models.layers import ChannelMixing, TimeMixing, lerps, matrix_state, norm_of, tuned_state

ROUNDS_EMBEDDING = False
"""The embedding's norm is computed in float32, whatever the source's dtype."""

UNUSED_IN_FIRST: frozenset[str] = frozenset({"att.v0", "att.v1", "att.v2"})
"""Tensors that layer 0 does not use, since it has no earlier value to mix in. Some files hold them all the same."""


def configure(shapes: Shapes) -> Dimensions:
    """The dimensions of RWKV-7. The low ranks are of decay w, in-context rate a, value residual v and gate g."""
    H, N = shapes["blocks.0.att.r_k"]
    # layer 0 has no value residual, and a one-layer model none at all
    factors = {x: shapes[f"blocks.0.att.{x}1"] for x in "wag"} | {"v": shapes.get("blocks.1.att.v1", (0, 1))}
    return Dimensions("7", H, N, {x: rank for x, (_, rank, *_) in factors.items()})


def entries(c: Config) -> list[Entry]:
    """The tensors of a layer, its two norms left out."""
    D, H, N = c.width, c.heads, c.head_size
    pairs = [
        entry for x in "wavg" for entry in (low_rank(f"att.{x}1", c.ranks[x], D), low_rank(f"att.{x}2", D, c.ranks[x]))
    ]
    return [
        *(Entry(f"att.x_{x}", "vector", (1, D)) for x in "rwkvag"),
        *(Entry(f"att.{x}0", "vector", (1, D)) for x in "wav"),
        *pairs,
        *(Entry(f"att.{x}", "vector", (D,)) for x in ("k_k", "k_a")),
        Entry("att.r_k", "vector", (H, N)),
        tuned_state(c),
        *(matrix(f"att.{x}", D, D) for x in ("receptance", "key", "value", "output")),
        *norm("att.ln_x", D),
        Entry("ffn.x_k", "vector", (1, D)),
        matrix("ffn.key", c.ffn, D),
        matrix("ffn.value", D, c.ffn, "sparse"),
    ]


def wkv_state(c: Config) -> WkvState:
    """One matrix a head."""
    return WkvState(matrix_state(c), (0.0,))


def time_mix(m: TimeMixing) -> None:
    ops, p, carry = m.ops, m.weights, m.carry
    a_r, a_w, a_k, a_v, a_a, a_g = lerps(p, m.normed, m.delta, "att.x_", "rwkvag")
    products = [
        Product(a_r, p["att.receptance.weight"]),
        Product(a_k, p["att.key.weight"]),
        Product(a_v, p["att.value.weight"]),
        Product(a_w, p["att.w1"], "tanh"),
        Product(a_a, p["att.a1"]),
        Product(a_g, p["att.g1"], "sigmoid"),
    ]
    if "v" in carry:
        products.append(Product(a_v, p["att.v1"]))
    r, k, v, w, rate, g, *low = ops.linear(*products)
    products = [
        Product(w, p["att.w2"], "soft_decay", p["att.w0"]),
        Product(rate, p["att.a2"], "sigmoid", p["att.a0"]),
        Product(g, p["att.g2"]),
        *(Product(each, p["att.v2"], "sigmoid", p["att.v0"]) for each in low),
    ]
    w, rate, g, *gate = ops.linear(*products)
    wkv = Wkv7(
        receptance=r,
        decay=w,
        key=k,
        value=v,
        rate=rate,
        gate=g,
        residual=ValueResidual(first=carry["v"], gate=gate[0]) if gate else None,
        key_scale=p["att.k_k"],
        key_rate=p["att.k_a"],
        bonus=p["att.r_k"],
        norm=norm_of(p, "att.ln_x", m.config.group_norm_eps),
        starts=m.starts,
        state=m.state,
    )
    carry.setdefault("v", v)
    ops.add(AddLinear(m.x, ops.add(wkv), p["att.output.weight"]))


def channel_mix(m: ChannelMixing) -> None:
    mixed = Lerp(m.normed, m.delta, m.weights["ffn.x_k"])
    (k,) = m.ops.linear(Product(mixed, m.weights["ffn.key.weight"], m.config.ffn_activation))
    m.ops.add(AddLinear(m.x, k, m.weights["ffn.value.weight"]))
