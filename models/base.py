"""The model: one driver for every version, frozen after load."""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import DeviceError, FormatError
from rwkv_cli.kernels.contract import Array, Backend, Product, Recorder, Starts
from rwkv_cli.kernels.cpu.cores import usable_cores
from rwkv_cli.kernels.devices import pick
from rwkv_cli.models.config import Config
from rwkv_cli.models.layers import Carry, norm_of
from rwkv_cli.models.registry import MODULES, tensors
from rwkv_cli.models.state import State
from rwkv_cli.quant import Checkpoint, Floats

CHUNK = 252
"""Tokens that go through the layers together: what bounds the memory of a long prompt. A multiple of 4 and of 6, the
blocks of tokens that matrix products take."""

_PROGRAMS = 4
"""Recorded passes that are kept: that of one token, and those of the lengths that came last; more where a batch needs
more in one step."""

Ids = Sequence[int] | NDArray[Any]
Floats32 = NDArray[np.float32]


class _Pass(NamedTuple):
    """A recorded pass of some tokens through the model."""

    program: Recorder
    output: Array | None


class Model:
    """An RWKV model: weights and nothing else. Give it tokens and a state, get logits and the next state.

    One model may serve any number of states. Raises FormatError where the checkpoint does not fit its own config.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: str = "cpu", threads: int | None = None,
        on_load: Callable[[int], object] | None = None,
    ) -> None:  # fmt: skip
        """`on_load` is called with the number of bytes of the weights that are where the device wants them."""
        cores = usable_cores()
        if threads is not None and not (type(threads) is int and 1 <= threads <= cores.logical):
            raise DeviceError(f"threads must be from 1 to {cores.logical} on this machine, not {threads}")
        self.threads = threads or cores.physical
        self._turn = threading.Lock()
        self._passes: OrderedDict[tuple[Any, ...], _Pass] = OrderedDict()
        self.ops: Backend = pick(device, checkpoint.path.stat().st_size)
        self.digest = checkpoint.digest
        """Of the source's values: the same for int8 and float conversions of one checkpoint."""
        stored_config = checkpoint.metadata("config", dict)
        try:
            self.config = Config.from_json(stored_config)
            self._arch = MODULES[self.config.version]
            entries = tensors(self.config)
        except (KeyError, ValueError, TypeError) as error:
            raise FormatError(f"{checkpoint.path}: its config is damaged ({error}); convert the model again") from None
        self._layers: list[dict[str, Any]] = [{} for _ in range(self.config.layers)]
        self._top: dict[str, Any] = {}
        present = set(checkpoint.names())
        if present - set(entries):
            raise FormatError(
                f"{checkpoint.path}: tensor {min(present - set(entries))} is not in its config; convert the model again"
            )
        loaded = 0
        for name, entry in entries.items():
            if entry.optional and name not in present:
                continue
            weight: Any
            if entry.kind == "vector":
                weight = self.ops.vector(checkpoint.vector(name, entry.shape))
                loaded += 4 * math.prod(entry.shape)
            else:
                stored = checkpoint.tensor(name, entry.shape)
                layouts = ("rows",) if entry.kind == "table" else ("tile", "columns")
                if isinstance(stored, Floats):
                    weight = self.ops.float_weight(stored.dtype, stored.bits)
                elif stored.layout in layouts:
                    weight = self.ops.int8_weight(
                        stored.layout, stored.shape, stored.values, stored.scales, stored.unit
                    )
                else:
                    raise FormatError(f"{checkpoint.path}: tensor {name} is stored as {stored.layout}")
                loaded += self.ops.weight_size(weight)[0]
            if on_load is not None:
                on_load(loaded)
            if name == entry.name:
                self._top[name] = weight
            else:
                self._layers[int(name.split(".")[1])][entry.name] = weight

    def new_state(self) -> State:
        """The state before the first token: empty, or the tuned one that came with the checkpoint."""
        c = self.config
        shape, start = self._arch.wkv_state(c)
        wkv = np.zeros((c.layers, *shape), np.float32)
        wkv[:] = np.reshape(np.array(start, np.float32), (-1,) + (1,) * (len(shape) - 1))
        for i, layer in enumerate(self._layers):
            if "att.time_state" in layer:
                wkv[i] = layer["att.time_state"]
        shift = np.zeros((c.layers, c.width), np.float32)
        return State(c.version, *map(self.ops.device_array, (shift, shift.copy(), wkv)), digest=self.digest)

    def forward(self, ids: Ids, state: State | None = None, all_logits: bool = False) -> tuple[Floats32, State]:
        """Logits after the last of `ids` ([V]), or after each of them ([T, V]), float32, and the state then.

        `state` is left as it is; None starts afresh. Raises ValueError for no ids, ids outside the vocabulary,
        or a state of another model.
        """
        state = self.new_state() if state is None else state.clone()
        return self.advance(ids, state, all_logits), state

    def advance(self, ids: Ids, state: State, all_logits: bool = False) -> Floats32:
        """`forward` that changes `state` in place, for loops that keep no earlier one."""
        logits = np.concatenate(self._run_one(ids, state, _every if all_logits else _last))
        return logits if all_logits else logits[0]

    def losses(self, ids: Ids, targets: Ids, state: State) -> NDArray[np.float64]:
        """−log p(targets[t]) after ids[t], in nats, [T]; changes `state` in place. Raises ValueError as `forward`."""
        goals = np.array(self._checked(targets))  # may be another view of the ids' memory
        if len(goals) != len(ids):
            raise ValueError(f"{len(goals)} targets for {len(ids)} ids")
        return np.concatenate(self._run_one(ids, state, _losses, goals))

    def _run_one(self, ids: Ids, state: State, head: "_Head", targets: NDArray[np.int64] | None = None) -> list[Any]:
        tokens = self._checked(ids)
        self._check_state(state)
        batch = State(state.version, *(array[:, None] for array in state.arrays().values()))
        return self._run(tokens, np.array([0, len(tokens)]), batch, head, targets)

    def advance_batch(self, ids: Sequence[Ids], state: State) -> Floats32:
        """`advance` for several sequences together: the logits after each one's last id, [B, V].

        `state` is a batch (`State.stack`) and is changed in place. Each sequence has ids of its own, as many as it
        likes but not none. Beside the others it gets the bits that it would get alone.
        """
        tokens = [self._checked(part) for part in ids]
        if not tokens:
            raise ValueError("a batch needs at least one sequence")
        self._check_state(state, (len(tokens),))
        return np.concatenate(self._run(np.concatenate(tokens), np.cumsum([0, *map(len, tokens)]), state, _last))

    def _run(
        self, tokens: NDArray[np.int64], starts: Starts, state: State, head: "_Head",
        targets: NDArray[np.int64] | None = None,
    ) -> list[Any]:  # fmt: skip
        """What `head` makes of the rows, chunk by chunk."""
        results = []
        arrays = list(state.arrays().values())
        with self._turn:
            for at in range(0, len(tokens), CHUNK):
                end = min(at + CHUNK, len(tokens))
                # the sequences with rows among these, the first and the last of them perhaps cut
                first, past = np.searchsorted(starts, at, "right") - 1, np.searchsorted(starts, end)
                bounds = starts[first : past + 1]
                inside, whole = np.clip(bounds - at, 0, end - at), tuple(bool(b <= end) for b in bounds[1:])
                inputs = [tokens[at:end], *arrays]
                if targets is not None:
                    inputs.append(targets[at:end])
                key = (head, inside.tobytes(), whole, int(first), arrays[0].shape)
                made = self._passes.pop(key, None)
                if made is None:
                    made = self._record(inputs, inside, whole, slice(first, past), head)
                self._passes[key] = made
                while len(self._passes) > max(_PROGRAMS, -(-len(tokens) // CHUNK) + 1):
                    self._passes.popitem(last=False)
                made.program.run(inputs)
                if made.output is not None:
                    results.append(made.program.read(made.output))
        return results

    def _record(
        self, inputs: Sequence[Array], starts: Starts, whole: tuple[bool, ...], these: slice, head: "_Head"
    ) -> _Pass:  # fmt: skip
        ops = self.ops.record(inputs, self.threads)
        ids, att_shift, ffn_shift, wkv, *targets = inputs
        c, top = self.config, self._top
        x = ops.embed(ids, top["emb.weight"])
        x = ops.layer_norm(x, norm_of(top, "blocks.0.ln0", c.norm_eps))
        ops.round_to(x, c.embedding_dtype)
        carry: Carry = {}
        for i, p in enumerate(self._layers):
            a = ops.layer_norm(x, norm_of(p, "ln1", c.norm_eps))
            delta = ops.token_shift(a, starts, att_shift[i, these])
            self._arch.time_mix(ops, c, p, x, a, delta, starts, wkv[i, these], carry)
            f = ops.layer_norm(x, norm_of(p, "ln2", c.norm_eps))
            delta = ops.token_shift(f, starts, ffn_shift[i, these])
            self._arch.channel_mix(ops, p, x, f, delta)
        # what no head reads is free for the head's arrays
        del a, f, delta, carry
        return _Pass(ops, head(self, ops, x, starts[1:][list(whole)] - 1, *targets))

    def logits(self, ops: Recorder, x: Array) -> Array:
        """Logits [T, V] of the residual stream [T, D]."""
        x = ops.layer_norm(x, norm_of(self._top, "ln_out", self.config.norm_eps))
        return ops.linear(Product(x, self._top["head.weight"]))[0]

    def _check_state(self, state: State, batch: tuple[int, ...] = ()) -> None:
        c = self.config
        of = "this model and this many sequences" if batch else "this model"
        shift = (c.layers, *batch, c.width)
        shapes = shift, shift, (c.layers, *batch, *self._arch.wkv_state(c)[0])
        for (name, array), shape in zip(state.arrays().items(), shapes, strict=True):
            if getattr(array, "shape", None) != shape or array.dtype != np.float32:
                raise ValueError(f"the state's {name} must be float32 {list(shape)}: it is not of {of}")
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise ValueError(f"the state's {name} must be contiguous and writeable")
        if state.version != c.version:
            raise ValueError(f"the state is one of RWKV-{state.version}, the model RWKV-{c.version}")
        # one that was loaded, or made elsewhere, stays on the device from here on
        state.att_shift, state.ffn_shift, state.wkv = map(self.ops.device_array, state.arrays().values())

    def _checked(self, ids: Ids) -> NDArray[np.int64]:
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or len(tokens) == 0 or tokens.dtype.kind not in "iu":
            raise ValueError("ids must be a non-empty sequence of integers")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab:
            bad = tokens[(tokens < 0) | (tokens >= self.config.vocab)][0]
            raise ValueError(f"token id {bad} is outside the model's vocabulary of {self.config.vocab}")
        return np.ascontiguousarray(tokens, np.int64)


_Head = Callable[..., Array | None]
"""Of a model, its recorder, the residual stream [T, D], the last row of each sequence that ends in it, and targets."""


def _last(model: Model, ops: Recorder, x: Array, ends: NDArray[np.int64]) -> Array | None:
    """Logits after each sequence's last row."""
    return model.logits(ops, ops.take(x, ends)) if len(ends) else None


def _every(model: Model, ops: Recorder, x: Array, ends: NDArray[np.int64]) -> Array:  # noqa: ARG001
    """Logits after every row."""
    return model.logits(ops, x)


def _losses(model: Model, ops: Recorder, x: Array, ends: NDArray[np.int64], targets: Array) -> Array:  # noqa: ARG001
    """Cross entropy of every row."""
    return ops.cross_entropy(model.logits(ops, x), targets)
