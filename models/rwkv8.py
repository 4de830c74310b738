"""RWKV-8 "Heron", its preview rc00: RWKV-7 with a table in each layer that gates the channel mixing by token.

Source: RWKV-LM, RWKV-v7/rwkv_v8_rc00_demo.py.
"""

from rwkv_cli.kernels.program import AddGated, Embed, Lerp, Product
from rwkv_cli.models import rwkv7
from rwkv_cli.models.config import Config, Dimensions, Entry, Shapes, matrix
from rwkv_cli.models.layers import ChannelMixing
from rwkv_cli.models.rwkv7 import ROUNDS_EMBEDDING as ROUNDS_EMBEDDING
from rwkv_cli.models.rwkv7 import UNUSED_IN_FIRST as UNUSED_IN_FIRST
from rwkv_cli.models.rwkv7 import time_mix as time_mix
from rwkv_cli.models.rwkv7 import wkv_state as wkv_state


def configure(shapes: Shapes) -> Dimensions:
    """The dimensions of RWKV-7."""
    return rwkv7.configure(shapes)._replace(version="8-rc00")


def entries(c: Config) -> list[Entry]:
    """The tensors of a layer, its two norms left out."""
    return [*rwkv7.entries(c), matrix("ffn.enn", c.vocab, c.width, "table")]


def channel_mix(m: ChannelMixing) -> None:
    """x += (V relu(K f_k)²) ∘ enn[token]."""
    ops, p = m.ops, m.weights
    mixed = Lerp(m.normed, m.delta, p["ffn.x_k"])
    (k,) = ops.linear(Product(mixed, p["ffn.key.weight"], m.config.ffn_activation))
    (out,) = ops.linear(Product(k, p["ffn.value.weight"]))
    ops.add(AddGated(m.x, out, ops.add(Embed(m.ids, p["ffn.enn.weight"]))))
