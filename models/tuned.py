"""Reads tuned initial states: files of state tuning, which hold the state before a text and nothing else.

A file has `blocks.{i}.att.time_state` [H, N, N] for every layer, as [value, key] (RWKV-LM, RWKV-v6/RWKV-v7 state
tuning). web-rwkv and ai00 have files of their own, see `naming.py`. Both token shifts start at zero.
"""

from pathlib import Path

import numpy as np

from rwkv_cli.errors import FormatError, UnsupportedModelError
from rwkv_cli.models.base import Model
from rwkv_cli.models.naming import tuned_states
from rwkv_cli.models.registry import tensors
from rwkv_cli.models.state import State
from rwkv_cli.quant import open_source

_NAME = "att.time_state"


def read_tuned_state(path: Path | str, model: Model) -> State:
    """The state before the first token that a `.pth` or safetensors file of state tuning gives `model`.

    Nothing in the file is executed. Raises FormatError for a file that is no such state or is damaged,
    UnsupportedModelError for one of another model or for a model that cannot have one, OSError.
    """
    path, c = Path(path), model.config
    entries = {name: entry for name, entry in tensors(c).items() if entry.name == _NAME}
    if not entries:
        raise UnsupportedModelError(f"{path}: RWKV-{c.version} has no initial state to tune; RWKV-5 to RWKV-7 have")
    source = tuned_states(path, open_source(path))
    if not any(name.endswith(_NAME) for name in source):
        if "wkv" in source:
            raise FormatError(f"{path}: a saved state, not a tuned initial one; rwkv generate --load-state takes it")
        raise FormatError(f"{path}: not a tuned initial state, since it holds no blocks.0.{_NAME}; give another file")
    odd = [name for name in entries if name not in source] + [name for name in source if name not in entries]
    if odd:
        what = "is missing" if odd[0] in entries else "is too much"
        raise UnsupportedModelError(
            f"{path}: tensor {odd[0]} {what}; a tuned initial state for this model holds one {_NAME} for each of its "
            f"{c.layers} layers and nothing else"
        )
    state = model.new_state()
    for i, (name, entry) in enumerate(entries.items()):
        tensor = source[name]
        if not entry.fits(tensor.shape):
            raise UnsupportedModelError(
                f"{path}: tensor {name} has shape {list(tensor.shape)}, the model's is {list(entry.shape)}; "
                "it is the state of another model"
            )
        values = tensor.float32().reshape(entry.shape)
        if not np.isfinite(values).all():
            raise FormatError(f"{path}: tensor {name} holds NaN or infinity; the file is damaged, download it again")
        state.wkv[i] = entry.derive(values) if entry.derive else values
    return state
