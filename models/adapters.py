"""Adapters: small files of fine-tuning that change a model's tensors while it is converted.

A pair of factors A [r, in] and B [out, r] adds B · A · scale to a matrix [out, in]. That is LoRA with scale alpha / r.
PiSSA begins with a pair of its own, which is taken off: it is a pair with scale −1, and the trained one has scale 1.
DiSHA's D has two forms. D [r, out] adds D[j mod r, i] to W[i, j]. D [b, r, r] adds W_ab · D_b + D_b to each block
W_ab [r, r]. Older files call it bone. All other tensors of an adapter replace the model's.

Sources: RWKV-PEFT 5b8aac9, merge/merge.py, merge/merge_disha.py, merge/merge_state.py and rwkvt/peft/rwkvLinear.py;
PEFT's adapter_config.json; web-rwkv, assets/scripts/convert_safetensors.py.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import FormatError
from rwkv_cli.models import naming
from rwkv_cli.models.config import Entry, Shape, squeezed
from rwkv_cli.quant import SourceTensor, open_source
from rwkv_cli.quant.source import SourceFile, contiguous

_USUAL_ALPHA = 32.0
"""The alpha that RWKV-PEFT trains with if it is not told another (train.py, --lora_config)."""

_START = "start of PiSSA"

_KINDS = {
    "init_lora_A": _START,
    "init_lora_B": _START,
    "lora_A": "LoRA",
    "lora_B": "LoRA",
    "disha": "DiSHA",
    "bone": "DiSHA",
}
"""The kind of a file, told by the last word of a name in it. The first that is found counts."""

Rows = NDArray[np.float64]
Change = Callable[[Rows, int], Rows]
"""A function of rows of a matrix and the number of the first one. It returns the rows as the adapter changes them."""


@dataclass(frozen=True)
class Merged(SourceTensor):
    """A matrix with an adapter in it. It is computed from its rows when they are read, in float64."""

    base: SourceTensor
    change: Change
    others: frozenset[SourceFile]
    """The adapter's own files."""

    @property
    def files(self) -> frozenset[SourceFile]:
        return self.base.files | self.others

    @property
    def item_size(self) -> float:
        return self.base.item_size

    def bits(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        with np.errstate(over="ignore", invalid="ignore"):  # conversion refuses what is no number
            return self.change(self.base.float32(start, stop).astype(np.float64), start).astype(np.float32)


@dataclass(frozen=True)
class Adapter:
    """A file of fine-tuning."""

    path: Path
    tensors: Mapping[str, SourceTensor]
    """By official names. Factors end in .lora_A, .lora_B, .init_lora_A, .init_lora_B, .disha or .bone."""
    kind: str
    scale: float | None = None
    """The scale of all pairs, or None if alpha tells it for each rank."""
    alpha: float = _USUAL_ALPHA
    alpha_from: str = ""
    """The file that tells alpha, or "" if the usual one is taken."""

    def __str__(self) -> str:
        number = f"alpha {self.alpha:g}" if self.scale is None else f"scale {self.scale:g}"
        return f"{self.path.name} ({self.kind}{f', {number}' if self.kind == 'LoRA' else ''})"

    @property
    def guessed(self) -> bool:
        """True if nothing tells the scale of this LoRA."""
        return self.kind == "LoRA" and self.scale is None and not self.alpha_from


def read_adapters(paths: Sequence[Path], scale: float | None) -> list[Adapter]:
    """The adapters in these files and folders. `scale` is that of LoRA; None takes what the files beside it say.

    An init_pissa.pth that lies beside an adapter belongs to it. Raises FormatError for what is no adapter, and OSError.
    """
    found = [_read(path) for path in dict.fromkeys(paths)]
    loras = [adapter for adapter in found if adapter.kind == "LoRA"]
    pissa = [adapter for adapter in found if adapter.kind == _START]
    beside = {adapter.path.absolute().parent / "init_pissa.pth" for adapter in loras if adapter.path.is_file()}
    if not pissa:
        pissa = [_read(start) for start in beside if start.is_file()]
        found = [*pissa, *found]
    if pissa and not len(pissa) == len(loras) == 1:
        raise FormatError(
            f"{pissa[0].path}: the start of a PiSSA adapter; give it with its one trained file: "
            f"--adapter TRAINED.pth --adapter {pissa[0].path.name}"
        )
    if scale is not None and pissa:
        raise FormatError(f"{pissa[0].path}: the start of PiSSA, which has no scale; leave --adapter-scale out")
    if scale is not None and not (loras and math.isfinite(scale)):
        raise FormatError(f"--adapter-scale {scale:g}: needs a LoRA adapter and a finite number; others have no scale")
    return [_scaled(adapter, scale, bool(pissa)) for adapter in found]


def _read(path: Path) -> Adapter:
    """The adapter in a file or folder."""
    tensors = naming.adapter(path, open_source(path))
    parts = {name.rpartition(".")[2] for name in tensors}
    kind = next((kind for part, kind in _KINDS.items() if part in parts), "")
    if not kind and "time_state" in parts:
        kind = "tuned state"
    if not kind:
        raise FormatError(f"{path}: not an adapter: it holds no lora_A, disha, bone or time_state; give another file")
    return Adapter(path, tensors, kind)


def _scaled(adapter: Adapter, scale: float | None, pissa: bool) -> Adapter:
    """The adapter with its scale, and with its kind where other files tell that."""
    path, tensors = adapter.path, adapter.tensors
    if adapter.kind == _START:
        return Adapter(path, tensors, adapter.kind, scale=-1.0)
    if adapter.kind == "LoRA" and pissa:
        return Adapter(path, tensors, "PiSSA", scale=1.0)
    if adapter.kind != "LoRA" or scale is not None:
        return Adapter(path, tensors, adapter.kind, scale)
    return Adapter(path, tensors, adapter.kind, None, *_alpha(path))


def _alpha(path: Path) -> tuple[float, str]:
    """A LoRA's alpha, and the name of the file that tells it: PEFT's settings or the log of RWKV-PEFT."""
    folder = path if path.is_dir() else path.absolute().parent
    file = folder / "adapter_config.json"
    if file.is_file() and (path.is_dir() or path.name.startswith("adapter_model.")):
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            alpha = settings["lora_alpha"]
            alpha = float(alpha) if type(alpha) is int else alpha
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise FormatError(f"{file}: not a readable JSON object with lora_alpha; download it again") from None
        start = str(settings.get("init_lora_weights"))
        odd = [name for name in ("use_rslora", "use_dora", "alpha_pattern") if settings.get(name)]
        odd += ["init_lora_weights"] if start.startswith(("pissa", "olora", "corda")) else []
        if odd or type(alpha) is not float or not math.isfinite(alpha):
            raise FormatError(
                f"{file}: its {odd[0] if odd else 'lora_alpha'} is not supported; merge the adapter with PEFT"
            )
        return alpha, file.name
    log = folder / "train_log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    told = re.findall(r"'lora_alpha': (\d+(?:\.\d+)?)", text)
    return (float(told[-1]), log.name) if told else (_USUAL_ALPHA, "")


def merge(tensors: Mapping[str, SourceTensor], table: Mapping[str, Entry], adapter: Adapter) -> dict[str, SourceTensor]:
    """The tensors of a model as an adapter changes them. `table` has all that such a model can have.

    No number is read yet. Raises FormatError, with the name of the tensor, where the adapter is of another model.
    """
    changed, left = dict(tensors), []
    factors: dict[str, list[_Factor]] = {}
    for name, tensor in sorted(adapter.tensors.items()):
        stem, _, part = name.rpartition(".")
        matrix = f"{stem}.weight"
        if part in _KINDS and len(tensors[matrix].shape if matrix in tensors else ()) == 2:
            factors.setdefault(matrix, []).append(_Factor(adapter.path, name, tensor))
        elif name in tensors or (name in table and not table[name].source):
            shape = tensors[name].shape if name in tensors else table[name].shape
            if squeezed(tensor.shape) != squeezed(shape):
                raise _misfit(adapter, name, f"has shape {list(tensor.shape)}, but the model's is {list(shape)}")
            changed[name] = tensor
        else:
            left.append(name)
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise _misfit(adapter, ", ".join(left[:5]) + more, "has no place in the model")
    for matrix, parts in factors.items():
        base = changed[matrix]
        change = _change(adapter, matrix, parts, base.shape)
        files = frozenset(part.tensor.file for part in parts)
        changed[matrix] = Merged(base.file, "F32", base.shape, 0, contiguous(base.shape), base, change, files)
    return changed


@dataclass(frozen=True)
class _Factor:
    """A tensor of an adapter that a matrix is changed with."""

    path: Path
    name: str
    tensor: SourceTensor

    def rows(self, start: int = 0, stop: int | None = None) -> Rows:
        """Rows [start, stop) of it."""
        values = self.tensor.float32(start, stop).astype(np.float64)
        if not np.isfinite(values).all():
            raise FormatError(
                f"{self.path}: tensor {self.name} holds NaN or infinity; the file is damaged, download it again"
            )
        return values


def _change(adapter: Adapter, matrix: str, parts: list[_Factor], shape: Shape) -> Change:
    """The change that the factors of a matrix of this shape make to its rows."""
    names, shapes = [part.name for part in parts], [part.tensor.shape for part in parts]
    out, inputs = shape
    match [name.rpartition(".")[2].removeprefix("init_") for name in names], shapes:
        case ["lora_A", "lora_B"], [(rank, a), (b, other)] if rank == other and (a, b) == (inputs, out) and rank:
            first, second = parts
            return _pair(first, second, adapter.alpha / rank if adapter.scale is None else adapter.scale)
        case ["disha" | "bone"], [(rank, columns)] if columns == out and rank:
            return _added(*parts)
        case ["disha" | "bone"], [(b, rank, other)] if (
            rank == other and b * rank == inputs and rank and out % rank == 0
        ):
            return _blocks(*parts)
        case ["lora_A", "lora_B"] | ["disha"] | ["bone"], _:
            text = " and ".join(str(list(each)) for each in shapes)
            raise _misfit(adapter, " and ".join(names), f"has shape {text}, which does not fit {matrix} {list(shape)}")
    raise _misfit(adapter, ", ".join(names), f"does not make up one change of {matrix}")


def _misfit(adapter: Adapter, names: str, what: str) -> FormatError:
    return FormatError(f"{adapter.path}: tensor {names} {what}; it is an adapter of another model or of another kind")


def _pair(a: _Factor, b: _Factor, scale: float) -> Change:
    """W + B · A · scale, with A [r, in] and B [out, r]."""

    def change(rows: Rows, start: int) -> Rows:
        return rows + b.rows(start, start + len(rows)) @ a.rows() * scale

    return change


def _added(d: _Factor) -> Change:
    """W[i, j] + D[j mod r, i], with D [r, out]. The last columns take the first rows of D."""

    def change(rows: Rows, start: int) -> Rows:
        turned = d.rows()[:, start : start + len(rows)].T
        return rows + turned[:, np.arange(rows.shape[1]) % turned.shape[1]]

    return change


def _blocks(d: _Factor) -> Change:
    """W_ab + W_ab · D_b + D_b for each block W_ab [r, r], with D [b, r, r]."""

    def change(rows: Rows, start: int) -> Rows:
        factors = d.rows()
        b, rank, _ = factors.shape
        n = len(rows)
        products = rows.reshape(n, b, rank).transpose(1, 0, 2) @ factors
        own = factors[:, np.arange(start, start + n) % rank]
        return rows + (products + own).transpose(1, 0, 2).reshape(n, b * rank)

    return change
