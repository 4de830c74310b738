"""A forward pass in the making, as the whole model writes it and as one layer alone does."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rwkv_cli.kernels.program import (
    Count,
    Embed,
    Input,
    InputMatrix,
    LayerNorm,
    LayerState,
    Program,
    RoundTo,
    TokenShift,
    Value,
)
from rwkv_cli.models.config import Config
from rwkv_cli.models.layers import Carry, ChannelMixing, Layer, TimeMixing, norm_of
from rwkv_cli.models.registry import MODULES


def kept_name(name: str) -> str:
    """The input for the states between rows, of a state's array."""
    return f"kept_{name}"


@dataclass(frozen=True)
class Pass:
    """The program of a pass, and everything that its layers read beside their rows."""

    ops: Program
    config: Config
    top: Layer
    """The tensors that belong to no layer."""
    ids: Input
    starts: Input
    state: Mapping[str, Input]
    """A state's arrays by name."""
    kept: Mapping[str, Input]
    """The arrays that get the state after each row, by the same names. There are none where nobody asks for them."""
    carry: Carry = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        config: Config,
        top: Layer,
        rows: Count,
        states: tuple[int, int],
        more: Iterable[Input | InputMatrix] = (),
        *,
        keeps: bool = False,
    ) -> "Pass":
        """An empty pass over so many rows, whose state arrays have `states` layers and sequences.

        `more` are inputs besides ids, starts and a state's arrays. `keeps` adds those of the states after each row.
        """
        layers, B = states
        ids, starts = Input("ids", (rows,), "I64"), Input("starts", (B + 1,), "I64")
        wkv = MODULES[config.version].wkv_state(config).shape
        parts = {"att_shift": (config.width,), "ffn_shift": (config.width,), "wkv": wkv}
        state = {name: Input(name, (layers, B, *part)) for name, part in parts.items()}
        kept = {name: Input(kept_name(name), (rows, layers, *part)) for name, part in parts.items()} if keeps else {}
        ops = Program(ids, starts, *state.values(), *kept.values(), *more)
        return cls(ops, config, top, ids, starts, state, kept)

    def _of_layer(self, name: str, place: int) -> LayerState:
        return LayerState(self.state[name], place, self.kept.get(name))

    def embed(self) -> Value:
        """The embedding of each token, as it is before the first layer."""
        c, ops = self.config, self.ops
        x = ops.add(Embed(self.ids, self.top["emb.weight"]))
        if not c.embedding_normed:
            x = ops.add(LayerNorm(x, norm_of(self.top, "blocks.0.ln0", c.norm_eps)))
        ops.add(RoundTo(x, c.embedding_dtype))
        return x

    def layer(self, x: Value, p: Layer, place: int) -> None:
        """Add what the layer of tensors `p` makes of x to it. Its state is the one at `place` of the state arrays."""
        c, ops, starts, arch = self.config, self.ops, self.starts, MODULES[self.config.version]
        a = ops.add(LayerNorm(x, norm_of(p, "ln1", c.norm_eps)))
        delta = ops.add(TokenShift(a, starts, self._of_layer("att_shift", place)))
        arch.time_mix(TimeMixing(ops, c, p, x, a, delta, starts, self._of_layer("wkv", place), self.carry))
        f = ops.add(LayerNorm(x, norm_of(p, "ln2", c.norm_eps)))
        delta = ops.add(TokenShift(f, starts, self._of_layer("ffn_shift", place)))
        arch.channel_mix(ChannelMixing(ops, c, p, x, f, delta, self.ids, self.embed, self.carry))

    def norm_outputs(self, x: Value) -> Value:
        """The rows that the head reads."""
        c = self.config
        eps = c.norm_eps if c.output_norm_eps is None else c.output_norm_eps
        return self.ops.add(LayerNorm(x, norm_of(self.top, "ln_out", eps)))
