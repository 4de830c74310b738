"""The recurrent state: all that a model remembers of a text. Its size is constant, and the caller owns it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from rwkv_cli.errors import FormatError
from rwkv_cli.models.config import Array
from rwkv_cli.quant import SourceTensor, open_source, replacing
from rwkv_cli.quant.safetensors import read_header
from rwkv_cli.quant.source import SourceFile

_ORDER = "key, value"
"""The order of the axes of a saved matrix state."""


@dataclass
class State:
    """The last inputs of both token shifts and the numbers of the recurrence, for each layer, in float32.

    The arrays are NumPy's, or they stay where the model's device has them. np.asarray then gives a copy.

    A batch, made by `stack`, has the states of B sequences in one. Each array has an axis B after the layers' axis.
    """

    version: str
    """The model's version, on which the meaning of `wkv` depends."""
    att_shift: Array
    """[L, D]"""
    ffn_shift: Array
    """[L, D]"""
    wkv: Array
    """[L, 3, D] in v4, [L, H, N, N] as [key, value] in v5 to v7."""
    digest: str = field(default="", kw_only=True)
    """The digest of the model's source, the same for all conversions of a checkpoint; "" if it is not known."""

    def clone(self) -> "State":
        """A copy that shares nothing."""
        copies = (array.copy() for array in self.arrays().values())
        return State(self.version, *copies, digest=self.digest)

    def arrays(self) -> dict[str, Array]:
        """The numbers by name."""
        return {"att_shift": self.att_shift, "ffn_shift": self.ffn_shift, "wkv": self.wkv}

    @classmethod
    def stack(cls, states: "Sequence[State]") -> "State":
        """A batch with copies of these, in order. Raises ValueError for no states or states of different models."""
        if len({(state.version, state.att_shift.shape, state.wkv.shape) for state in states}) != 1:
            raise ValueError("a batch is made of one state or more, all of one model")
        parts = zip(*(state.arrays().values() for state in states), strict=True)
        return cls(states[0].version, *(np.stack(arrays, axis=1) for arrays in parts), digest=states[0].digest)

    def row(self, b: int) -> "State":
        """A view of sequence `b` of a batch, which changes with the batch. `clone` it to keep it or to run it alone."""
        return State(self.version, *(array[:, b] for array in self.arrays().values()), digest=self.digest)

    def take(self, other: "State") -> None:
        """Become a copy of another state of the same model, in this one's own memory."""
        for array, values in zip(self.arrays().values(), other.arrays().values(), strict=True):
            array[:] = values

    def save(self, path: Path | str, metadata: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file. An older file of that name stays until the new one is whole and on disk.

        `metadata` is kept beside the numbers, for `read_metadata`.
        """
        arrays = {name: np.ascontiguousarray(np.asarray(array)) for name, array in self.arrays().items()}
        own = {"rwkv": self.version, "digest": self.digest, "order": _ORDER}
        with replacing(Path(path)) as file:
            file.write(save(arrays, {**(metadata or {}), **own}))

    @staticmethod
    def read_metadata(path: Path | str) -> dict[str, str]:
        """The metadata that was saved beside a state. Raises FormatError if the file is no saved state."""
        _, metadata = _opened(Path(path))
        return metadata

    @classmethod
    def load(cls, path: Path | str, like: "State") -> "State":
        """Read a saved state for the model that `like` belongs to.

        Raises FormatError (a ValueError) for a state of another version, size or source, and for a damaged one.
        """
        tensors, metadata = _opened(Path(path))
        version, digest = metadata["rwkv"], metadata.get("digest", "")
        if version != like.version:
            raise FormatError(f"{path}: a state of RWKV-{version}, the model is RWKV-{like.version}")
        if metadata.get("order") != _ORDER:
            raise FormatError(f"{path}: a state that another version of rwkv-cli saved; make it again")
        arrays = {}
        for name, expected in like.arrays().items():
            tensor = tensors[name]
            have, want = (tensor.dtype, tensor.shape), ("F32", expected.shape)
            if have != want:
                raise FormatError(f"{path}: {name} is {have}, the model's is {want}; it is a state of another model")
            arrays[name] = np.array(tensor.float32())
            if not np.isfinite(arrays[name]).all():
                raise FormatError(f"{path}: {name} holds NaN or infinity; the file is damaged, make it again")
        if digest and like.digest and digest != like.digest:
            raise FormatError(f"{path}: a state of another model of the same size; load it with the one that made it")
        return cls(version, **arrays, digest=like.digest)


class Snapshots:
    """Room for the states between the rows of a pass. Each pass takes it anew."""

    def __init__(self, like: State, rows: int) -> None:
        """`like` is a state of the model, and `rows` is the most rows that a pass may have."""
        self.rows, self._like = rows, like
        # written now, since memory that a pass is the first to write makes it slow
        self.arrays = {name: np.full((rows, *array.shape), np.nan, np.float32) for name, array in like.arrays().items()}
        """The numbers by name, [rows, L, …]."""

    def after(self, row: int) -> State:
        """A view of the state after a row that was not the last. The next pass changes it."""
        return State(self._like.version, *(array[row] for array in self.arrays.values()), digest=self._like.digest)


def _opened(path: Path) -> tuple[dict[str, SourceTensor], dict[str, str]]:
    """The tensors and the metadata of a saved state."""
    file = SourceFile(path)
    try:
        tensors, metadata = read_header(file)
    except FormatError:
        tensors, metadata = {}, {}
    if "rwkv" not in metadata or not {"att_shift", "ffn_shift", "wkv"} <= set(tensors):
        raise FormatError(f"{path}: {_other_file(path)}")
    return tensors, metadata


def _other_file(path: Path) -> str:
    """A description of a file that is no saved state."""
    try:
        names = open_source(path)
    except FormatError:
        names = {}
    if any(name.endswith(".time_state") for name in names):
        return "a tuned initial state, not a saved one; give it with --state"
    return "not a saved state; give a file that --save-state wrote"
