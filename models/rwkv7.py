"""RWKV-7 "Goose" (arXiv 2503.14456; RWKV-LM, RWKV-v7/rwkv_v7_numpy.py)."""

from rwkv_cli.kernels.backend import Backend, Starts
from rwkv_cli.models.config import Array, Config, Entry, Shape, Shapes, low_rank, matrix, norm
from rwkv_cli.models.layers import Carry, Layer, matrix_state, tuned_state


def configure(shapes: Shapes) -> tuple[str, int, int, dict[str, int]]:
    """Version, heads, head size and low ranks (decay w, in-context rate a, value residual v, gate g)."""
    H, N = shapes["blocks.0.att.r_k"]
    ranks = {x: shapes[f"blocks.0.att.{x}1"][1] for x in "wag"}
    # layer 0 has no value residual, a one-layer model none at all
    ranks["v"] = shapes.get("blocks.1.att.v1", (0, 1))[1]
    return "7", H, N, ranks


def entries(c: Config) -> list[Entry]:
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
        tuned_state(c, transposed=False),
        *(matrix(f"att.{x}", D, D) for x in ("receptance", "key", "value", "output")),
        *norm("att.ln_x", D),
        Entry("ffn.x_k", "vector", (1, D)),
        matrix("ffn.key", c.ffn, D),
        matrix("ffn.value", D, c.ffn, "sparse"),
    ]


UNUSED_IN_FIRST = frozenset({"att.v0", "att.v1", "att.v2"})
"""Layer 0 has no earlier value to mix in; some files hold these tensors for it all the same."""


def wkv_state(c: Config) -> tuple[Shape, tuple[float, ...]]:
    """S as [value, key]."""
    return matrix_state(c), (0.0,)


def time_mix(
    ops: Backend, c: Config, p: Layer, x: Array, delta: Array, starts: Starts, state: Array, carry: Carry
) -> Array:
    r, w, k, v, a, g = (ops.lerp(x, delta, p[f"att.x_{name}"]) for name in "rwkvag")
    if "v" in carry:
        gate = ops.linear(ops.linear(v, p["att.v1"]), p["att.v2"])
        ops.add(gate, p["att.v0"])
        v = ops.linear(v, p["att.value.weight"])
        ops.blend(v, carry["v"], gate)
    else:
        carry["v"] = v = ops.linear(v, p["att.value.weight"])
    r = ops.linear(r, p["att.receptance.weight"])
    k = ops.linear(k, p["att.key.weight"])
    w = ops.linear(ops.linear(w, p["att.w1"], "tanh"), p["att.w2"])
    ops.add(w, p["att.w0"])
    a = ops.linear(ops.linear(a, p["att.a1"]), p["att.a2"])
    ops.add(a, p["att.a0"])
    g = ops.linear(ops.linear(g, p["att.g1"], "sigmoid"), p["att.g2"])
    kappa, beta = ops.delta_terms(k, w, a, p["att.k_k"], p["att.k_a"], c.heads)
    y = ops.wkv7(r, w, k, v, kappa, beta, starts, state)
    ops.group_norm(y, p["att.ln_x.weight"], p["att.ln_x.bias"], c.heads, c.group_norm_eps)
    ops.bonus(y, r, k, v, p["att.r_k"])
    ops.multiply(y, g)
    return ops.linear(y, p["att.output.weight"])


def channel_mix(ops: Backend, p: Layer, x: Array, delta: Array) -> Array:
    k = ops.linear(ops.lerp(x, delta, p["ffn.x_k"]), p["ffn.key.weight"], "relu_squared")
    return ops.linear(k, p["ffn.value.weight"])
