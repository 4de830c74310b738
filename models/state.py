"""The recurrent state: all a model remembers, of constant size, owned by the caller."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rwkv_cli.models.config import Array


@dataclass
class State:
    """Per layer: the last inputs of both token shifts, and what the recurrence holds. float32."""

    att_shift: Array
    """[L, D]"""
    ffn_shift: Array
    """[L, D]"""
    wkv: Array
    """v4 [L, 3, D]; v5, v6 [L, H, N, N] as [key, value]; v7 [L, H, N, N] as [value, key]."""

    def clone(self) -> "State":
        """A copy that shares nothing."""
        return State(self.att_shift.copy(), self.ffn_shift.copy(), self.wkv.copy())

    @property
    def nbytes(self) -> int:
        return self.att_shift.nbytes + self.ffn_shift.nbytes + self.wkv.nbytes

    def save(self, path: Path | str, metadata: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file."""
        arrays: dict[str, Any] = {name: np.ascontiguousarray(array) for name, array in vars(self).items()}
        save_file(arrays, path, dict(metadata or {}))

    @classmethod
    def load(cls, path: Path | str, like: "State") -> "State":
        """Read what `save` wrote. Raises ValueError if it is not a state of the same shapes as `like`."""
        arrays = {}
        try:
            with safe_open(path, "np") as file:
                for name, expected in vars(like).items():
                    view = file.get_slice(name)
                    if view.get_dtype() != "F32" or tuple(view.get_shape()) != expected.shape:
                        raise ValueError(f"{path}: {name} is {view.get_shape()}, the model's is {list(expected.shape)}")
                    arrays[name] = np.array(file.get_tensor(name))
        except SafetensorError as error:
            raise ValueError(f"{path}: not a saved state ({error})") from None
        return cls(**arrays)
