"""The architectures, and the search for the one that a checkpoint has."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

from rwkv_cli.errors import UnsupportedModelError
from rwkv_cli.models import gguf, huggingface, naming, rwkv4, rwkv5, rwkv6, rwkv7, rwkv7a, rwkv8
from rwkv_cli.models.adapters import Adapter, merge
from rwkv_cli.models.config import Config, Entry, Shapes, matrix, norm
from rwkv_cli.quant import Source, SourceTensor

MODULES: dict[str, ModuleType] = {
    "4": rwkv4,
    "5.0": rwkv5,
    "5.0r2": rwkv5,
    "5.1": rwkv5,
    "5.2": rwkv5,
    "6": rwkv6,
    "7": rwkv7,
    "7a": rwkv7a,
    "8-rc00": rwkv8,
}

_BASE_FIRST = "name its base model first, as in `rwkv convert BASE.pth --adapter ADAPTER.pth`"

_RELATIVES = [
    (r"\.lora_[AB]\b|\.lora\.[01]$", f"a LoRA adapter; {_BASE_FIRST}"),
    (r"\.init_lora_[AB]$", f"the start of a PiSSA adapter; {_BASE_FIRST}"),
    (r"\.(disha|bone)$", f"a DiSHA adapter; {_BASE_FIRST}"),
    (r"^(proj|vit)\.", "a part of VisualRWKV, which reads pictures and is not supported; plain RWKV is"),
    (r"\brosa", "a preview of RWKV-8 with ROSA, which is not supported; of RWKV-8, the preview rc00 is"),
    (r"\.qkv\.(ennk|emm)\b", "the hybrid preview of RWKV-8, which is not supported; the plain preview rc00 is"),
    (r"\.qkv\.", "RWKV-7b (DeepEmbedAttention), which is not supported; RWKV-7 and RWKV-7a are"),
]
"""Patterns of tensor names that only unsupported models have, newest first, and the names of those models."""


class Match(NamedTuple):
    """A tensor to convert: what the model says of it and its official name."""

    entry: Entry
    origin: str


class Recognized(NamedTuple):
    """A checkpoint that is a supported model."""

    config: Config
    tensors: dict[str, tuple[Entry, SourceTensor]]
    """Each tensor to convert, by its name in the converted file."""


def recognize(
    source: Source, settings: Mapping[str, Any] | None = None, adapters: Iterable[Adapter] = ()
) -> Recognized:
    """The model that a checkpoint holds, in whatever naming, with the adapters merged into it.

    `settings` are its config.json's or its GGUF metadata.
    Raises UnsupportedModelError, naming the variant or the tensor, for anything else.
    """
    settings = settings or {}
    metadata = settings if gguf.ARCHITECTURE in settings else None
    if metadata:
        source, settings = gguf.official(source, metadata)
    changed = naming.official(source)
    config = detect({name: tensor.shape for name, tensor in changed.items()})
    if metadata:
        gguf.check(config, metadata)
    for adapter in adapters:
        changed = merge(changed, tensors(config), adapter)
    if MODULES[config.version].ROUNDS_EMBEDDING:
        config = replace(config, embedding_dtype=changed["emb.weight"].float_dtype)
    config, changed = huggingface.honoured(config, changed, settings, fla=naming.is_fla(source))
    matched = match(config, {name: tensor.shape for name, tensor in changed.items()}).items()
    return Recognized(config, {name: (entry, changed[origin]) for name, (entry, origin) in matched})


def detect(shapes: Shapes) -> Config:
    """The config of a checkpoint with these tensors.

    Raises UnsupportedModelError, naming the variant or the tensor, for anything that is no supported model.
    """
    for pattern, what in _RELATIVES:
        telling = next((name for name in shapes if re.search(pattern, name)), None)
        if telling:
            raise UnsupportedModelError(f"this is {what} (found {telling})")
    if shapes and all(name.endswith(".time_state") for name in shapes):
        raise UnsupportedModelError(f"these are tuned initial states only; {_BASE_FIRST}")
    module = _module(shapes)
    layers = {int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d{1,4})\.", name))}
    if layers != set(range(len(layers))):
        missing = min(set(range(max(layers))) - layers)
        raise UnsupportedModelError(f"layer {missing} is missing: there is no tensor blocks.{missing}.*")
    try:
        vocab, width = shapes["emb.weight"]
        ffn, *_ = shapes["blocks.0.ffn.key.weight"]
        found = module.configure(shapes)
    except KeyError as error:
        raise UnsupportedModelError(f"tensor {error.args[0]} is missing") from None
    except (ValueError, IndexError):
        raise UnsupportedModelError(
            "emb.weight or the time mixing of layer 0 has the wrong number of dimensions"
        ) from None
    if found.heads * found.head_size != width:
        raise UnsupportedModelError(
            f"{found.heads} heads of {found.head_size} do not make up the width {width} of emb.weight"
        )
    config = Config(
        version=found.version,
        layers=len(layers),
        width=width,
        vocab=vocab,
        heads=found.heads,
        head_size=found.head_size,
        ffn=ffn,
        ranks=found.ranks,
    )
    try:
        return Config.from_json(config.as_json())
    except ValueError as error:
        raise UnsupportedModelError(f"{error}: {config}") from None


def _module(names: Collection[str]) -> ModuleType:
    """The version of a checkpoint, told by the names in the time mixing of its layer 0, and by its tables."""
    first = {name.removeprefix("blocks.0.att.") for name in names if name.startswith("blocks.0.att.")}
    if "r_k" in first or "k_k" in first:
        if any(".ffn.s_emb" in name for name in names):
            return rwkv7a
        return rwkv8 if any(".ffn.enn." in name for name in names) else rwkv7
    if "time_maa_x" in first:
        return rwkv6
    if "time_decay" not in first:
        raise UnsupportedModelError("not an RWKV model in a known naming: it has no time mixing in layer 0")
    return rwkv5 if "ln_x.weight" in first else rwkv4


def tensors(config: Config) -> dict[str, Entry]:
    """Every tensor of a model by its full name in the converted file, optional ones included.

    Tables of layers come last, so that the system reads none of them ahead with the matrices that each token needs.
    """
    D, V = config.width, config.vocab
    module = MODULES[config.version]
    ln0 = [] if config.embedding_normed else norm("blocks.0.ln0", D)
    top = [matrix("emb", V, D, "table"), *ln0, *norm("ln_out", D), matrix("head", V, D)]
    try:
        layer = [*norm("ln1", D), *norm("ln2", D), *module.entries(config)]
    except KeyError as error:
        raise UnsupportedModelError(f"its config lacks the low rank {error}; convert the model again") from None
    named = {
        f"blocks.{i}.{entry.name}": entry
        for i in range(config.layers)
        for entry in layer
        if i > 0 or entry.name not in module.UNUSED_IN_FIRST
    }
    ordered = sorted(named.items(), key=lambda item: item[1].kind == "table")
    return {entry.name: entry for entry in top} | dict(ordered)


def match(config: Config, shapes: Shapes) -> dict[str, Match]:
    """Each tensor to convert, by its name in the converted file.

    Raises UnsupportedModelError for a tensor that is missing, is of the wrong shape or does not belong to the model.
    """
    matched: dict[str, Match] = {}
    expected = {f"blocks.0.{name}" for name in MODULES[config.version].UNUSED_IN_FIRST}
    for name, entry in tensors(config).items():
        source = name.removesuffix(entry.name) + entry.origin
        expected.add(source)
        if source not in shapes:
            if entry.optional:
                continue
            raise UnsupportedModelError(f"tensor {source} is missing (read as RWKV-{config.version})")
        if not entry.fits(shapes[source]):
            want, have = list(entry.source_shape or entry.shape), list(shapes[source])
            hint = ", so it is transposed" if have == want[::-1] else ""
            raise UnsupportedModelError(f"tensor {source} has shape {have}, expected {want}{hint}")
        matched[name] = Match(entry, source)
    extra = sorted(set(shapes) - expected)
    if extra:
        first, *others = extra
        more = f" (and {len(others)} more)" if others else ""
        raise UnsupportedModelError(f"tensor {first}{more} is not part of RWKV-{config.version}; a variant of it?")
    return matched
