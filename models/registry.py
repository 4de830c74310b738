"""Which architectures there are, and which one a checkpoint is."""

import re
from collections.abc import Iterable
from types import ModuleType

from rwkv_cli.errors import UnsupportedModelError
from rwkv_cli.models import rwkv4, rwkv5, rwkv6, rwkv7
from rwkv_cli.models.config import Config, Entry, Shapes, matrix, norm

MODULES: dict[str, ModuleType] = {
    "4": rwkv4, "5.0": rwkv5, "5.1": rwkv5, "5.2": rwkv5, "6": rwkv6, "7": rwkv7,
}  # fmt: skip

_MAX_LAYERS = 9999

# newest first; each pattern is looked for among the tensor names
_REFUSED = [
    (r"\.lora_[AB]\b|\.lora\.[01]$", "a LoRA adapter; merge it into its base model first"),
    (r"\.ffn\.enn\b", "RWKV-8, which is not supported yet; RWKV-4 to RWKV-7 are"),
    (r"\.qkv\.", "RWKV-7b (DeepEmbedAttention), which is not supported; plain RWKV-7 is"),
    (r"\.ffn\.s_emb", "RWKV-7a (DeepEmbed), which is not supported; plain RWKV-7 is"),
]


def _module(names: Iterable[str]) -> ModuleType:
    first = {name.removeprefix("blocks.0.att.") for name in names if name.startswith("blocks.0.att.")}
    if "r_k" in first or "k_k" in first:
        return rwkv7
    if "time_maa_x" in first:
        return rwkv6
    if "time_decay" not in first:
        raise UnsupportedModelError("not an RWKV model in a known naming: it has no time mixing in layer 0")
    return rwkv5 if "ln_x.weight" in first else rwkv4


def detect(shapes: Shapes) -> Config:
    """The architecture and dimensions of a checkpoint in official naming.

    Raises UnsupportedModelError, naming the variant or the tensor, for anything that is not exactly one of them.
    """
    for pattern, what in _REFUSED:
        found = next((name for name in shapes if re.search(pattern, name)), None)
        if found:
            raise UnsupportedModelError(f"this is {what} (found {found})")
    if shapes and all(name.endswith(".time_state") for name in shapes):
        raise UnsupportedModelError("these are tuned initial states only, without a model")
    module = _module(shapes)
    layers = {int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d{1,4})\.", name))}
    if layers != set(range(len(layers))):
        missing = min(set(range(max(layers))) - layers)
        raise UnsupportedModelError(f"layer {missing} is missing: there is no tensor blocks.{missing}.*")
    try:
        vocab, width = shapes["emb.weight"]
        ffn = shapes["blocks.0.ffn.key.weight"][0]
        version, heads, head_size, ranks = module.configure(shapes)
    except KeyError as error:
        raise UnsupportedModelError(f"tensor {error.args[0]} is missing") from None
    except (ValueError, IndexError):
        raise UnsupportedModelError(
            "emb.weight or the time mixing of layer 0 has the wrong number of dimensions"
        ) from None
    if heads * head_size != width:
        raise UnsupportedModelError(f"{heads} heads of {head_size} do not make up the width {width} of emb.weight")
    config = Config(version, len(layers), width, vocab, heads, head_size, ffn, ranks)
    try:
        return Config.from_json(config.as_json())
    except ValueError as error:
        raise UnsupportedModelError(f"{error}: {config}") from None


def _unused_in_first(module: ModuleType) -> frozenset[str]:
    """Tensors that layer 0 never uses, whether a file holds them or not."""
    return getattr(module, "UNUSED_IN_FIRST", frozenset())


def tensors(config: Config) -> dict[str, Entry]:
    """Every tensor of a model of this shape by its full name in the converted file, optional ones included."""
    D, V = config.width, config.vocab
    module = MODULES[config.version]
    table: dict[str, Entry] = {}
    for entry in [
        matrix("emb", V, D, "table"),
        *norm("blocks.0.ln0", D),
        *norm("ln_out", D),
        matrix("head", V, D),
    ]:
        table[entry.name] = entry
    skip = _unused_in_first(module)
    try:
        layer = [*norm("ln1", D), *norm("ln2", D), *module.entries(config)]
    except KeyError as error:
        raise UnsupportedModelError(f"its config lacks the low rank {error}; convert the model again") from None
    if config.layers > _MAX_LAYERS:
        raise UnsupportedModelError(f"{config.layers} layers are more than any model has; convert the model again")
    for i in range(config.layers):
        for entry in layer:
            if i > 0 or entry.name not in skip:
                table[f"blocks.{i}.{entry.name}"] = entry
    return table


def match(config: Config, shapes: Shapes) -> dict[str, tuple[Entry, str]]:
    """Entry and source name for each tensor to convert, checked: nothing missing, extra or of the wrong shape."""
    plan: dict[str, tuple[Entry, str]] = {}
    skip = _unused_in_first(MODULES[config.version])
    expected = {f"blocks.0.{name}" for name in skip}
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
        plan[name] = (entry, source)
    extra = sorted(set(shapes) - expected)
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise UnsupportedModelError(f"tensor {extra[0]}{more} is not part of RWKV-{config.version}; a variant of it?")
    return plan
