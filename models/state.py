"""The recurrent state: all a model remembers, of constant size, owned by the caller."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rwkv_cli.models.config import Array


@dataclass
class State:
    """Per layer: the last inputs of both token shifts, and what the recurrence holds. float32."""

    version: str
    """Of the model: what `wkv` means depends on it."""
    att_shift: Array
    """[L, D]"""
    ffn_shift: Array
    """[L, D]"""
    wkv: Array
    """v4 [L, 3, D]; v5, v6 [L, H, N, N] as [key, value]; v7 [L, H, N, N] as [value, key]."""

    def clone(self) -> "State":
        """A copy that shares nothing."""
        return State(self.version, *(np.array(array, order="C") for array in self.arrays().values()))

    def arrays(self) -> dict[str, Array]:
        """The numbers by name."""
        return {"att_shift": self.att_shift, "ffn_shift": self.ffn_shift, "wkv": self.wkv}

    def save(self, path: Path | str) -> None:
        """Write a safetensors file."""
        save_file({k: np.ascontiguousarray(a) for k, a in self.arrays().items()}, path, {"rwkv": self.version})

    @classmethod
    def load(cls, path: Path | str, like: "State") -> "State":
        """Read what `save` wrote. Raises ValueError if it is not a state of the same version and shapes as `like`."""
        arrays = []
        try:
            with safe_open(path, "np") as file:
                version = (file.metadata() or {}).get("rwkv")
                if version != like.version:
                    raise ValueError(f"{path}: a state of RWKV-{version}, the model is RWKV-{like.version}")
                for name, expected in like.arrays().items():
                    view = file.get_slice(name)
                    have, want = (view.get_dtype(), view.get_shape()), ("F32", list(expected.shape))
                    if have != want:
                        raise ValueError(f"{path}: {name} is {have}, the model's is {want}")
                    arrays.append(np.array(file.get_tensor(name)))
        except SafetensorError as error:
            raise ValueError(f"{path}: not a saved state ({error})") from None
        return cls(like.version, *arrays)
