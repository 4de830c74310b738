"""The model: one driver for every version, frozen after load."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import DeviceError, FormatError, UnsupportedModelError
from rwkv_cli.kernels.contract import Backend, Executable, Loadable, Watch
from rwkv_cli.kernels.cpu.cores import usable_cores
from rwkv_cli.kernels.devices import choose
from rwkv_cli.kernels.program import (
    Count,
    CrossEntropy,
    Input,
    Product,
    Program,
    TakeRows,
    Value,
)
from rwkv_cli.models.config import Config
from rwkv_cli.models.passes import Pass, kept_name
from rwkv_cli.models.registry import MODULES, tensors
from rwkv_cli.models.state import Snapshots, State
from rwkv_cli.models.turn import Turn
from rwkv_cli.quant import ModelFile
from rwkv_cli.quant.formats import takes

_PASSES = 8
"""Compiled passes that are kept, the last used ones."""

Ids = Sequence[int] | NDArray[Any]
Floats32 = NDArray[np.float32]

Head = Literal["last", "every", "ahead", "losses", "outputs"]
"""The end of a pass: logits after each sequence's last row or after every row, the same with the states between the
rows kept, cross entropies, or the rows that the head would read."""


def chunks(tokens: int, most: int) -> Iterator[slice]:
    """Yield slices of a text's tokens, each of `most` tokens but the last."""
    return (slice(at, min(at + most, tokens)) for at in range(0, tokens, most))


@dataclass(frozen=True)
class PassKind:
    """The kind of a compiled pass, which serves any number of rows: one, or up to a chunk."""

    head: Head
    single: bool
    """True for one token, whose kernels differ from those for many."""
    sequences: int


class WrittenPass(NamedTuple):
    """A pass as a program, and the value that it is run for."""

    program: Program
    output: Value


class _CompiledPass(NamedTuple):
    executable: Executable
    output: Value


class Model:
    """An RWKV model: weights and nothing else. Give it tokens and a state, get logits and the next state.

    One model may serve any number of states. Raises FormatError where the checkpoint does not fit its own config.
    """

    def __init__(
        self,
        checkpoint: ModelFile,
        device: str = "cpu",
        threads: int | None = None,
        on_load: Callable[[int], object] | None = None,
    ) -> None:
        """`on_load` is called with the number of bytes of the weights that are where the device wants them."""
        cores = usable_cores()
        if threads is not None and not (type(threads) is int and 1 <= threads <= cores.logical):
            raise DeviceError(f"threads must be from 1 to {cores.logical} on this machine, not {threads}")
        self.threads = threads or cores.physical
        self._turn = Turn()
        self._passes: OrderedDict[PassKind, _CompiledPass] = OrderedDict()
        self.backend: Backend = choose(device, checkpoint.path.stat().st_size)
        self.digest = checkpoint.digest
        """The digest of the source's values: the same for all conversions of one checkpoint."""
        stored_config = checkpoint.metadata("config", dict)
        try:
            self.config = Config.from_json(stored_config)
            self._arch = MODULES[self.config.version]
            entries = tensors(self.config)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{checkpoint.path}: {error}") from None
        except (KeyError, ValueError, TypeError) as error:
            raise FormatError(f"{checkpoint.path}: its config is damaged ({error}); convert the model again") from None
        self.layers: list[dict[str, Any]] = [{} for _ in range(self.config.layers)]
        """The tensors of each layer by their names in the converted file, `blocks.i.` left out."""
        self.top: dict[str, Any] = {}
        """The tensors that belong to no layer."""
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
                weight = self.backend.vector(checkpoint.vector(name, entry.shape))
                loaded += 4 * math.prod(entry.shape)
            else:
                stored = checkpoint.tensor(name, entry.shape)
                if not takes(stored.layout, entry.kind):
                    raise FormatError(f"{checkpoint.path}: tensor {name} is stored as {stored.layout}")
                weight = self.backend.weight(stored)
                loaded += weight.nbytes
                if entry.kind == "table":
                    checkpoint.read_by_row(name)
            if on_load is not None:
                on_load(loaded)
            if name == entry.name:
                self.top[name] = weight
            else:
                self.layers[int(name.split(".")[1])][entry.name] = weight

    def new_state(self) -> State:
        """The state before the first token: empty, or the tuned one that came with the checkpoint."""
        c = self.config
        shape, start = self._arch.wkv_state(c)
        wkv = np.zeros((c.layers, *shape), np.float32)
        wkv[:] = np.reshape(np.array(start, np.float32), (-1,) + (1,) * (len(shape) - 1))
        for i, layer in enumerate(self.layers):
            if "att.time_state" in layer:
                wkv[i] = layer["att.time_state"]
        shift = np.zeros((c.layers, c.width), np.float32)
        return State(c.version, *map(self.backend.device_array, (shift, shift.copy(), wkv)), digest=self.digest)

    def new_snapshots(self, rows: int) -> Snapshots:
        """Room for the states between so many rows. Raises DeviceError where the device cannot keep them."""
        if not self.backend.keeps_states:
            raise DeviceError(
                f"device {self.backend.name} cannot read ahead; use --device cpu, or leave out --draft and --lookup"
            )
        return Snapshots(self.new_state(), rows)

    def forward(self, ids: Ids, state: State | None = None, all_logits: bool = False) -> tuple[Floats32, State]:
        """Logits after the last of `ids` ([V]), or after each of them ([T, V]), float32, and the state then.

        `state` is left as it is; None starts afresh. Raises ValueError for no ids, ids outside the vocabulary,
        or a state of another model.
        """
        state = self.new_state() if state is None else state.clone()
        return self.advance(ids, state, all_logits), state

    def advance(
        self, ids: Ids, state: State, all_logits: bool = False, watch: Callable[[int], object] | None = None
    ) -> Floats32:
        """`forward` that changes `state` in place, for loops that keep no earlier one.

        `watch` is called several times a second with how many ids are read. What it raises ends the call, as Ctrl-C
        does then, and the state is what it was.
        """
        logits = _joined(self._run_one(ids, state, "every" if all_logits else "last", watch=watch))
        return logits if all_logits else logits[0]

    def losses(
        self, ids: Ids, targets: Ids, state: State, watch: Callable[[int], object] | None = None
    ) -> NDArray[np.float64]:
        """−log p(targets[t]) after ids[t], in nats, [T]; changes `state` in place. Raises ValueError as `forward`.

        `watch` is that of `advance`.
        """
        goals = self.checked(targets)
        if len(goals) != len(ids):
            raise ValueError(f"{len(goals)} targets for {len(ids)} ids")
        return np.concatenate(self._run_one(ids, state, "losses", {"targets": goals}, watch))[:, 0]

    def read_ahead(self, ids: Ids, state: State, snapshots: Snapshots) -> Floats32:
        """Logits after each of `ids`, [T, V]; changes `state` in place and keeps the states between the ids.

        Logits and states have the bits that they would have if each id were read alone. Raises ValueError as
        `forward`, or for more ids than `snapshots` has room for.
        """
        if len(ids) > snapshots.rows:
            raise ValueError(f"there is room for {snapshots.rows} ids, not for {len(ids)}")
        kept = {kept_name(name): array[: len(ids)] for name, array in snapshots.arrays.items()}
        return _joined(self._run_one(ids, state, "ahead", kept))

    def outputs(self, ids: Ids, state: State, watch: Callable[[int], object] | None = None) -> Floats32:
        """The last layer's normed outputs after each of `ids`, [T, D], which the head would read. Changes `state`.

        `watch` is that of `advance`. Raises ValueError as `forward`.
        """
        return _joined(self._run_one(ids, state, "outputs", watch=watch))

    def _run_one(
        self,
        ids: Ids,
        state: State,
        head: Head,
        by_row: Mapping[str, NDArray[Any]] | None = None,
        watch: Callable[[int], object] | None = None,
    ) -> list[Any]:
        """Run the rows of one sequence. `by_row` has what an end needs beside ids, a part for each row."""
        tokens = self.checked(ids)
        self._check_state(state)
        self._take_in(state)
        arrays = state.arrays().values()
        starts, batch = np.array([0, len(tokens)]), State(state.version, *(array[:, None] for array in arrays))
        if watch is None:
            return self._run(tokens, starts, batch, head, by_row=by_row)
        before = [array.copy() for array in arrays]
        try:
            return self._run(tokens, starts, batch, head, by_row=by_row, watch=watch)
        except BaseException:
            for array, kept in zip(arrays, before, strict=True):
                array[:] = kept
            raise

    def advance_batch(
        self, ids: Sequence[Ids], state: State, all_logits: bool = False, watch: Callable[[int], object] | None = None
    ) -> Floats32:
        """`advance` for several sequences together: the logits after the last id of each that has ids, [B, V].

        With `all_logits` they are those after each id, one sequence after the other. `state` is a batch (`State.stack`)
        and is changed in place. Each sequence has ids of its own, as many as it likes. One without ids stays as it is
        and has no logits, but not all may be so. On the CPU, a sequence gets the bits beside the others that it would
        get alone. After what `watch` raises, the state is of no more use.
        """
        tokens = [self.checked(part) if len(part) else np.zeros(0, np.int64) for part in ids]
        if not tokens:
            raise ValueError("a batch needs at least one sequence")
        if not any(map(len, tokens)):
            raise ValueError("a batch needs at least one sequence with ids")
        self._check_state(state, (len(tokens),))
        self._take_in(state)
        starts = np.cumsum([0, *map(len, tokens)])
        head: Head = "every" if all_logits else "last"
        return _joined(self._run(np.concatenate(tokens), starts, state, head, watch=watch))

    def _run(
        self,
        tokens: NDArray[np.int64],
        starts: NDArray[np.int64],
        state: State,
        head: Head,
        *,
        by_row: Mapping[str, NDArray[Any]] | None = None,
        watch: Callable[[int], object] | None = None,
    ) -> list[Any]:
        """Run the rows chunk by chunk, and return what `head` makes of each chunk."""
        results = []
        with self._turn:
            for part in chunks(len(tokens), self.backend.chunk):
                rows = part.stop - part.start
                inside = np.clip(starts - part.start, 0, rows)
                ended = (part.start < starts[1:]) & (starts[1:] <= part.stop) & (starts[:-1] < starts[1:])
                over = inside[1:][ended]
                arrays = {"ids": tokens[part], "starts": inside, **state.arrays()}
                if head == "last":
                    arrays["ends"] = over - 1
                arrays |= {name: array[part] for name, array in (by_row or {}).items()}
                executable, output = self._compiled(PassKind(head, rows == 1, len(starts) - 1))
                executable.run(arrays, watch and _part_of(watch, part))
                if watch is not None:
                    watch(part.stop)
                if head != "last" or len(over):
                    results.append(executable.read(output))
        return results

    def _compiled(self, kind: PassKind) -> _CompiledPass:
        """The compiled pass of this kind."""
        made = self._passes.pop(kind, None)
        if made is None:
            written = self.write_pass(kind)
            made = _CompiledPass(self.backend.compile(written.program, self.threads), written.output)
        self._passes[kind] = made
        while len(self._passes) > _PASSES:
            self._passes.popitem(last=False)
        return made

    def kernels(self, *heads: Head) -> list[Loadable]:
        """The kernels of passes of one sequence with these ends. There are none where the first run loads them."""
        programs = [self.write_pass(kind).program for kind in _kinds(heads)]
        return list(dict.fromkeys(k for program in programs for k in self.backend.kernels(program, self.threads)))

    def prepare(self, *heads: Head) -> None:
        """Compile passes of one sequence with these ends, so that the first takes no longer than the next."""
        runs = not self.kernels(*heads)
        for kind in _kinds(heads):
            if runs:
                ids = [0] if kind.single else [0, 0]
                targets = {"targets": self.checked(ids)} if kind.head == "losses" else None
                self._run_one(ids, self.new_state(), kind.head, targets)
            else:
                self._compiled(kind)

    def write_pass(self, kind: PassKind) -> WrittenPass:
        """A pass of some tokens, as a program over ids, starts, a state's arrays and what its end needs.

        Whoever measures a pass reads the program; `_compiled` runs it.
        """
        count = Count(1 if kind.single else self.backend.chunk)
        ends = Input("ends", (Count(min(count.most, kind.sequences)),), "I64")
        targets = Input("targets", (count,), "I64")
        at_the_end = {"last": [ends], "losses": [targets]}.get(kind.head, [])
        states = self.config.layers, kind.sequences
        written = Pass.begin(self.config, self.top, count, states, at_the_end, keeps=kind.head == "ahead")
        ops, x = written.ops, written.embed()
        for i, p in enumerate(self.layers):
            written.layer(x, p, i)
        if kind.head == "last":
            x = ops.add(TakeRows(x, ends))
        x = written.norm_outputs(x)
        if kind.head == "outputs":
            return WrittenPass(ops, ops.keep(x))
        (output,) = ops.linear(Product(x, self.top["head.weight"]))
        if kind.head == "losses":
            output = ops.add(CrossEntropy(output, targets))
        return WrittenPass(ops, ops.keep(output))

    def _check_state(self, state: State, batch: tuple[int, ...] = ()) -> None:
        c = self.config
        of = "this model and this many sequences" if batch else "this model"
        shift = (c.layers, *batch, c.width)
        shapes = shift, shift, (c.layers, *batch, *self._arch.wkv_state(c).shape)
        for (name, array), shape in zip(state.arrays().items(), shapes, strict=True):
            if getattr(array, "shape", None) != shape or array.dtype != np.float32:
                raise ValueError(f"the state's {name} must be float32 {list(shape)}: it is not of {of}")
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise ValueError(f"the state's {name} must be contiguous and writeable")
        if state.version != c.version:
            raise ValueError(f"the state is one of RWKV-{state.version}, the model RWKV-{c.version}")

    def _take_in(self, state: State) -> None:
        """Move a state that was loaded, or made elsewhere, to the device, where it stays from here on."""
        state.att_shift, state.ffn_shift, state.wkv = map(self.backend.device_array, state.arrays().values())

    def checked(self, ids: Ids) -> NDArray[np.int64]:
        """The ids as an array. Raises ValueError as `forward`."""
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or len(tokens) == 0 or tokens.dtype.kind not in "iu":
            raise ValueError("ids must be a non-empty sequence of integers")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab:
            bad = tokens[(tokens < 0) | (tokens >= self.config.vocab)][0]
            raise ValueError(f"token id {bad} is outside the model's vocabulary of {self.config.vocab}")
        return np.ascontiguousarray(tokens, np.int64)


def _kinds(heads: Iterable[Head]) -> list[PassKind]:
    return [PassKind(head, single, 1) for head in heads for single in (True, False)]


def _part_of(watch: Callable[[int], object], part: slice) -> Watch:
    """Tell `watch` how many ids of a chunk would be read, though they go through the layers together."""
    return lambda done: watch(part.start + int(done * (part.stop - part.start)))


def _joined(parts: list[Floats32]) -> Floats32:
    """The rows of all parts. One part is not copied: logits of a batch are many."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
