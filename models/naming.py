"""Names of tensors. Other namings are brought to the official one (RWKV-LM's .pth), and no value is touched.

Sources: transformers, models/rwkv/convert_rwkv_checkpoint_to_hf.py (v4); the remote code of RWKV/rwkv-5-world and
RWKV/rwkv-6-world as listed in llama.cpp's tensor_mapping.py; flash-linear-attention, utils/convert_from_rwkv6.py and
convert_from_rwkv7.py; web-rwkv, assets/scripts/convert_safetensors.py.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from rwkv_cli.errors import FormatError
from rwkv_cli.models import rwkv6
from rwkv_cli.quant import Joined, Source, SourceTensor, is_safetensors
from rwkv_cli.quant.dtypes import BITS
from rwkv_cli.quant.source import rows_of, turned

_WRAPPERS = re.compile(r"^(_forward_module\.|module\.|base_model\.model\.)+|(?<![^.])_orig_mod\.")
"""The words that training programs put before and into names: DeepSpeed, DDP, PEFT and torch.compile."""

_OWNERS = re.compile(r"^(model|rwkv7|rwkv)\.(?=(emb|embeddings|blocks|ln_out|head)\.)")
"""The words that Hugging Face folders put before names: the name of the model inside of a causal language model."""

_WORLD = [
    (r"^rwkv\.", ""),
    (r"^embeddings\.", "emb."),
    (r"\.pre_ln\.", ".ln0."),
    (r"\.attention\.", ".att."),
    (r"\.feed_forward\.", ".ffn."),
    (r"\.time_mix_key$", ".time_mix_k"),
    (r"\.time_mix_value$", ".time_mix_v"),
    (r"\.time_mix_receptance$", ".time_mix_r"),
    (r"\.time_mix_gate$", ".time_mix_g"),
]

_FLA = [
    (r"^embeddings\.", "emb."),
    (r"^model\.norm\.", "ln_out."),
    (r"^lm_head\.", "head."),
    (r"^model\.layers\.", "blocks."),
    (r"\.pre_norm\.", ".ln0."),
    (r"\.attn_norm\.", ".ln1."),
    (r"\.ffn_norm\.", ".ln2."),
    (r"\.attn\.g_norm\.", ".att.ln_x."),
    (r"\.attn\.r_proj\.", ".att.receptance."),
    (r"\.attn\.k_proj\.", ".att.key."),
    (r"\.attn\.v_proj\.", ".att.value."),
    (r"\.attn\.o_proj\.", ".att.output."),
    (r"\.attn\.([wavg])_lora\.lora\.0\.weight$", r".att.\g<1>1"),
    (r"\.attn\.([wavg])_lora\.lora\.2\.weight$", r".att.\g<1>2"),
    (r"\.attn\.([wav])_lora\.lora\.2\.bias$", r".att.\g<1>0"),
    (r"\.attn\.g_proj\.", ".att.gate."),
    (r"\.attn\.w_proj\.linear\.lora\.0\.weight$", ".att.time_decay_w1"),
    (r"\.attn\.w_proj\.linear\.lora\.2\.weight$", ".att.time_decay_w2"),
    (r"\.attn\.w_proj\.linear\.lora\.2\.bias$", ".att.time_decay"),
    (r"\.attn\.x_proj\.0\.mu$", ".att.time_maa_x"),
    (r"\.attn\.bonus$", ".att.time_faaaa"),
    (r"\.ffn\.key\.mu$", ".ffn.time_maa_k"),
    (r"\.ffn\.receptance\.mu$", ".ffn.time_maa_r"),
    (r"\.attn\.", ".att."),
    (r"(?<!\.x_proj\.0)\.linear\.weight$", ".weight"),
]

_FLA_MIXES = "rwkvg"
"""The order of RWKV-6's five mixes in flash-linear-attention."""

_FACTORS = [
    (r"\.lora\.0$", ".lora_A"),
    (r"\.lora\.1$", ".lora_B"),
    (r"\.(lora_[AB])(\.default)?\.weight$", r".\1"),
]


def plain(name: str) -> str:
    """The name without what programs put before it."""
    return _OWNERS.sub("", _WRAPPERS.sub("", name))


def is_fla(names: Iterable[str]) -> bool:
    """Return true for the names of flash-linear-attention."""
    return any(plain(name).startswith("model.layers.") for name in names)


def kind_of(name: str) -> str:
    """A tensor's name without its layer and ending, such as att.key, ffn.value or emb."""
    return re.sub(r"^blocks\.[^.]*\.", "", name.removesuffix(".weight"))


def official(source: Source) -> dict[str, SourceTensor]:
    """The tensors of a checkpoint under their official names. Unknown names stay as they are."""
    named = [(plain(name), tensor) for name, tensor in source.items()]
    if is_fla(source):
        named = [pair for name, tensor in named for pair in _from_fla(name, tensor)]
    else:
        named = _from_web([(_rename(name, _WORLD), tensor) for name, tensor in named])
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in named:
        if name in tensors:
            raise FormatError(f"{tensor.path}: holds {name} twice, under two namings; remove one of them")
        tensors[name] = tensor
    return tensors


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, to in rules:
        name = re.sub(pattern, to, name)
    return name


def _from_web(named: list[tuple[str, SourceTensor]]) -> list[tuple[str, SourceTensor]]:
    """The official tensors of a web-rwkv file; those of any other file stay as they are.

    There, low-rank factors and states are turned. v5.1 to v6 have a `time_first` in place of `time_faaaa`, and v6 has
    its mixes under the names of v5's (web-rwkv, assets/scripts/convert_safetensors.py). Nothing but the ending .st
    tells that the state in a v5.0 is turned.
    """
    shapes = {name: tensor.shape for name, tensor in named}
    rules = []
    v6 = "blocks.0.att.time_mix_w1" in shapes
    if v6:
        rules = [(r"\.time_mix_", ".time_maa_")]
    if "blocks.0.att.gate.weight" in shapes and "blocks.0.att.time_first" in shapes:
        rules += [(r"\.time_first$", ".time_faaaa")]
    first = [shapes.get(f"blocks.0.att.{x}1", ()) for x in "wag"]
    width = shapes.get("emb.weight", (0, 0))[-1]
    v7 = all(len(shape) == 2 and shape[1] == width for shape in first) and any(shape[0] != width for shape in first)
    v5_0 = "blocks.0.att.gate.weight" not in shapes and "blocks.0.att.time_first" in shapes
    states = {tensor.path for name, tensor in named if name.endswith(".att.time_state")}
    v5_0 = v5_0 and any(path.suffix == ".st" and is_safetensors(path) for path in states)
    if rules or v7 or v5_0:
        named = [(_rename(name, rules), turned(t) if _turned_in_web(name, t) else t) for name, t in named]
    return named


def _turned_in_web(name: str, tensor: SourceTensor) -> bool:
    """Return true for a tensor that web-rwkv keeps with its last two axes swapped."""
    low_rank = r"\.att\.(time_mix_w[12]|time_decay_w[12]|[wavg][12]|time_state)$"
    return len(tensor.shape) > 1 and re.search(low_rank, name) is not None


def tuned_states(path: Path, source: Source) -> Source:
    """The tuned states in a file, [value, key] as officially.

    web-rwkv and ai00 keep them turned, in safetensors files. Nothing but the ending .state or .st tells these.
    """
    named = {plain(name): tensor for name, tensor in source.items()}
    if path.suffix in (".state", ".st") and is_safetensors(path):
        named = {name: turned(tensor) if _turned_in_web(name, tensor) else tensor for name, tensor in named.items()}
    return named


def adapter(path: Path, source: Source) -> Source:
    """The tensors of an adapter by their official names, its factors as RWKV-PEFT has them.

    PEFT's factors end in `.weight`. web-rwkv calls A `lora.0` and turns it, and calls B `lora.1`.
    """
    if all(name.endswith(".time_state") for name in source):
        return tuned_states(path, source)
    named = official({name: turned(tensor) if name.endswith(".lora.0") else tensor for name, tensor in source.items()})
    return {_rename(name, _FACTORS): tensor for name, tensor in named.items()}


def _from_fla(name: str, tensor: SourceTensor) -> Iterator[tuple[str, SourceTensor]]:
    """The official tensors that one of flash-linear-attention stands for.

    There, low-rank factors are linears [out, in]. The mixes of RWKV-6, and those of RWKV-7 in older files, are stacked.
    """
    new = _rename(name, _FLA)
    shape, stem = tensor.shape, new.rpartition(".att.")[0] + ".att."
    if name.endswith((".lora.0.weight", ".lora.2.weight")) and len(shape) == 2:
        yield new, turned(tensor)
    elif new.endswith(".att.x_x") and shape[:1] == (6,):
        yield from ((f"{stem}x_{x}", part) for x, part in zip("rwkvag", rows_of(tensor), strict=True))
    elif new.endswith(".att.x_bias") and shape[:1] == (5,):
        yield from ((f"{stem}time_maa_{x}", part) for x, part in zip(_FLA_MIXES, rows_of(tensor), strict=True))
    elif new.endswith(".att.x_proj.0.linear.weight") and len(shape) == 2 and shape[0] % 5 == 0:
        yield f"{stem}time_maa_w1", Joined.of([turned(part) for part in _fifths(tensor, 0)], axis=1)
    elif new.endswith(".att.x_proj.2.weight") and len(shape) == 2 and shape[1] % 5 == 0:
        parts = [turned(part) for part in _fifths(tensor, 1)]
        deep = [replace(part, shape=(1, *part.shape), strides=(0, *part.strides)) for part in parts]
        yield f"{stem}time_maa_w2", Joined.of(deep, axis=0)
    else:
        yield new, tensor


def _fifths(tensor: SourceTensor, axis: int) -> list[SourceTensor]:
    """The parts of a matrix for the five mixes of RWKV-6, in the official order."""
    length = tensor.shape[axis] // 5
    shape = tuple(length if i == axis else n for i, n in enumerate(tensor.shape))
    step = length * tensor.strides[axis] * BITS[tensor.dtype].itemsize
    return [replace(tensor, shape=shape, start=tensor.start + _FLA_MIXES.index(x) * step) for x in rwkv6.MIXES]
