"""RWKV-7a: RWKV-7 with DeepEmbed, a table in each layer that gates the channel mixing by token.

Source: RWKV-LM, RWKV-v7/rwkv_v7a_demo.py.
"""

from rwkv_cli.kernels.program import AddLinear, Embed, Gate, Lerp, Product, RowProducts
from rwkv_cli.models import rwkv7
from rwkv_cli.models.config import Config, Dimensions, Entry, Shapes, low_rank, matrix
from rwkv_cli.models.layers import ChannelMixing
from rwkv_cli.models.rwkv7 import ROUNDS_EMBEDDING as ROUNDS_EMBEDDING
from rwkv_cli.models.rwkv7 import UNUSED_IN_FIRST as UNUSED_IN_FIRST
from rwkv_cli.models.rwkv7 import time_mix as time_mix
from rwkv_cli.models.rwkv7 import wkv_state as wkv_state


def configure(shapes: Shapes) -> Dimensions:
    """The dimensions of RWKV-7, and the rank of the gate s."""
    found = rwkv7.configure(shapes)
    _, rank = shapes["blocks.0.ffn.s1"]
    return found._replace(version="7a", ranks=found.ranks | {"s": rank})


def entries(c: Config) -> list[Entry]:
    """The tensors of a layer, its two norms left out."""
    rank = c.ranks["s"]
    return [
        *rwkv7.entries(c),
        matrix("ffn.s_emb", c.vocab, rank * rank, "table"),
        matrix("ffn.s_emb_x", rank * rank, c.width),
        low_rank("ffn.s1", rank, c.width),
        low_rank("ffn.s2", c.ffn, rank),
        Entry("ffn.s0", "vector", (1, c.ffn)),
    ]


def channel_mix(m: ChannelMixing) -> None:
    """x += V (relu(K f_k)² ∘ (s0 + f S1 · M · S2)), where M is the token's own matrix: s_emb[token] + s_emb_x · E."""
    ops, p = m.ops, m.weights
    if "embedding" not in m.carry:
        m.carry["embedding"] = m.embed()
    own = ops.add(Embed(m.ids, p["ffn.s_emb.weight"]))
    ops.add(AddLinear(own, m.carry["embedding"], p["ffn.s_emb_x.weight"]))
    mixed = Lerp(m.normed, m.delta, p["ffn.x_k"])
    key = Product(mixed, p["ffn.key.weight"], m.config.ffn_activation)
    k, low = ops.linear(key, Product(m.normed, p["ffn.s1"]))
    (gate,) = ops.linear(Product(ops.add(RowProducts(low, own)), p["ffn.s2"], bias=p["ffn.s0"]))
    ops.add(Gate(k, gate))
    ops.add(AddLinear(m.x, k, p["ffn.value.weight"]))
