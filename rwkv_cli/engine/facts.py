"""Facts that a converted file tells without its weights."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

from rwkv_cli.engine.recipes import mixed_kind
from rwkv_cli.engine.stored import StoredTemplate
from rwkv_cli.errors import ConversationError, FormatError
from rwkv_cli.quant import Checkpoint
from rwkv_cli.quant.formats import format_of


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Collect everything that a converted file tells without its weights."""
    rows = []
    for name in checkpoint.names():
        entry = checkpoint.layout(name)
        row: dict[str, Any] = {"name": name, "layout": entry["layout"], "shape": entry["shape"]}
        size = checkpoint.stored_bytes(name)  # and with it a check that every array is there
        row |= {"dtype": checkpoint.stored[name].dtype, "bytes": size}
        rows.append(row | {"error": checkpoint.error(name)})
    kept = checkpoint.metadata("kept", list, [])
    parameters = sum(prod(row["shape"]) for row in rows)
    return {
        "path": str(checkpoint.path),
        "bytes": checkpoint.path.stat().st_size,
        "parameters": parameters,
        "bits_per_weight": 8 * sum(row["bytes"] for row in rows) / max(parameters, 1),
        "config": checkpoint.metadata("config", dict),
        **{key: checkpoint.metadata(key, str) for key in ("quantization", "tokenizer")},
        **_template(checkpoint),
        "source": checkpoint.metadata("source", str),
        "adapters": checkpoint.metadata("adapters", list, []),
        "calibration": _calibration(checkpoint),
        "digest": checkpoint.digest,
        "formats": _formats(rows, kept),
        "kept": kept,
        "tensors": rows,
    }


def _formats(rows: Sequence[Mapping[str, Any]], kept: Collection[str]) -> dict[str, dict[str, Any]]:
    """Tell the format and the bits of each kind of weights."""
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    names: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        format, kind = format_of(row["layout"]), mixed_kind(row["name"])
        if format is not None and (format.QUANTIZED or row["name"] in kept):
            kinds[kind].append(row)
            names[kind].append(format.NAME)
    return {
        kind: {
            "format": ", ".join(dict.fromkeys(names[kind])),
            "bits": 8 * sum(row["bytes"] for row in each) / sum(prod(row["shape"]) for row in each),
        }
        for kind, each in kinds.items()
    }


def _calibration(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Tell what the rounding was fitted to and what quantizing cost; None for a file that was not calibrated."""
    found: dict[str, Any] = checkpoint.metadata("calibration", dict, {})
    kinds = {"text": str, "tokens": int, "held_out": int, "kl": float, "top1": float}
    if found and any(type(found.get(key)) is not kind for key, kind in kinds.items()):
        raise FormatError(f"{checkpoint.path}: metadata 'calibration' is damaged; convert the model again")
    return found or None


def _template(checkpoint: Checkpoint) -> dict[str, Any]:
    """Tell the chat template, and what can be chosen with it."""
    stored = StoredTemplate.of(checkpoint)
    try:
        form = stored.template()
    except ConversationError:  # a newer version knows it
        return {"template": stored.name, "styles": [], "think": []}
    return {"template": stored.name, "styles": form.styles, "think": list(form.modes) if form.thinks else []}
