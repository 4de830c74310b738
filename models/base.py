"""The model: one driver for every version, frozen after load."""

import threading
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.backend import Backend, DeviceError, Starts, pick
from rwkv_cli.models.config import Array, Config
from rwkv_cli.models.layers import Carry
from rwkv_cli.models.registry import MODULES, tensors
from rwkv_cli.models.state import State
from rwkv_cli.quant import Checkpoint, Floats, FormatError

_ONE_AT_A_TIME = threading.Lock()
"""numba's fallback for threads (workqueue) must not be entered twice; the kernels use all cores anyway."""

CHUNK = 256
"""Tokens that go through the layers together: what bounds the memory of a long prompt."""

Ids = Sequence[int] | NDArray[Any]


class Model:
    """An RWKV model: weights and nothing else. Give it tokens and a state, get logits and the next state.

    One model may serve any number of states. Raises FormatError where the checkpoint does not fit its own config.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", threads: int | None = None) -> None:
        most: int = getattr(numba.config, "NUMBA_NUM_THREADS")  # noqa: B009 - made at run time
        if threads is not None and not (type(threads) is int and 1 <= threads <= most):
            raise DeviceError(f"threads must be from 1 to {most} on this machine, not {threads}")
        self.threads = threads or most
        self.ops: Backend = pick(device)
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
        for name, entry in entries.items():
            if entry.optional and name not in present:
                continue
            weight: Any
            if entry.kind == "vector":
                weight = self.ops.vector(checkpoint.vector(name, entry.shape))
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
        return State(c.version, shift, shift.copy(), wkv, digest=self.digest)

    def forward(self, ids: Ids, state: State | None = None, all_logits: bool = False) -> tuple[Array, State]:
        """Logits after the last of `ids` ([V]), or after each of them ([T, V]), float32, and the state then.

        `state` is left as it is; None starts afresh. Raises ValueError for no ids, ids outside the vocabulary,
        or a state of another model.
        """
        state = self.new_state() if state is None else state.clone()
        return self.advance(ids, state, all_logits), state

    def advance(self, ids: Ids, state: State, all_logits: bool = False) -> Array:
        """`forward` that changes `state` in place, for loops that keep no earlier one."""
        tokens = self._checked(ids)
        self._check_state(state)
        batch = State(state.version, *(array[:, None] for array in state.arrays().values()))
        logits = self._logits(tokens, np.array([0, len(tokens)]), batch, all_logits)
        return logits if all_logits else logits[0]

    def advance_batch(self, ids: Sequence[Ids], state: State) -> Array:
        """`advance` for several sequences together: the logits after each one's last id, [B, V].

        `state` is a batch (`State.stack`) and is changed in place. Each sequence has ids of its own, as many as it
        likes but not none. Beside the others it gets the bits that it would get alone.
        """
        tokens = [self._checked(part) for part in ids]
        if not tokens:
            raise ValueError("a batch needs at least one sequence")
        self._check_state(state, (len(tokens),))
        return self._logits(np.concatenate(tokens), np.cumsum([0, *map(len, tokens)]), state, every=False)

    def _logits(self, tokens: NDArray[np.int64], starts: Starts, state: State, every: bool) -> Array:
        """Logits after every row [T, V], or after the last row of each of the batch's sequences [B, V]."""
        logits = []
        with _ONE_AT_A_TIME:
            numba.set_num_threads(self.threads)
            for at in range(0, len(tokens), CHUNK):
                rows = tokens[at : at + CHUNK]
                end = at + len(rows)
                # the sequences with rows among these, the first and the last of them perhaps cut
                first, past = np.searchsorted(starts, at, "right") - 1, np.searchsorted(starts, end)
                bounds = starts[first : past + 1]
                x = self._blocks(rows, np.clip(bounds - at, 0, len(rows)), state, slice(first, past))
                if not every:
                    x = self.ops.take(x, bounds[1:][bounds[1:] <= end] - 1 - at)
                if len(x):
                    logits.append(self._head(x))
        return np.concatenate(logits)

    def _check_state(self, state: State, batch: tuple[int, ...] = ()) -> None:
        c = self.config
        of = "this model and this many sequences" if batch else "this model"
        shift = (c.layers, *batch, c.width)
        shapes = shift, shift, (c.layers, *batch, *self._arch.wkv_state(c)[0])
        for (name, array), shape in zip(state.arrays().items(), shapes, strict=True):
            if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != np.float32:
                raise ValueError(f"the state's {name} must be float32 {list(shape)}: it is not of {of}")
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise ValueError(f"the state's {name} must be contiguous and writeable")
        if state.version != c.version:
            raise ValueError(f"the state is one of RWKV-{state.version}, the model RWKV-{c.version}")

    def _checked(self, ids: Ids) -> NDArray[np.int64]:
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or len(tokens) == 0 or tokens.dtype.kind not in "iu":
            raise ValueError("ids must be a non-empty sequence of integers")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab:
            bad = tokens[(tokens < 0) | (tokens >= self.config.vocab)][0]
            raise ValueError(f"token id {bad} is outside the model's vocabulary of {self.config.vocab}")
        return tokens.astype(np.int64)

    def _blocks(self, tokens: NDArray[np.int64], starts: Starts, state: State, these: slice) -> Array:
        """The residual stream after the last layer, [T, D], for `these` sequences of the batch."""
        ops, c, top = self.ops, self.config, self._top
        x = ops.embed(tokens, top["emb.weight"])
        x = ops.layer_norm(x, top["blocks.0.ln0.weight"], top["blocks.0.ln0.bias"], c.norm_eps)
        ops.round_to(x, c.embedding_dtype)
        carry: Carry = {}
        for i, p in enumerate(self._layers):
            a = ops.layer_norm(x, p["ln1.weight"], p["ln1.bias"], c.norm_eps)
            delta = ops.token_shift(a, starts, state.att_shift[i, these])
            ops.add(x, self._arch.time_mix(ops, c, p, a, delta, starts, state.wkv[i, these], carry))
            f = ops.layer_norm(x, p["ln2.weight"], p["ln2.bias"], c.norm_eps)
            delta = ops.token_shift(f, starts, state.ffn_shift[i, these])
            ops.add(x, self._arch.channel_mix(ops, p, f, delta))
        return x

    def _head(self, x: Array) -> Array:
        """Logits [T, V] of the residual stream [T, D]."""
        ops, top = self.ops, self._top
        x = ops.layer_norm(x, top["ln_out.weight"], top["ln_out.bias"], self.config.norm_eps)
        return ops.linear(x, top["head.weight"])
