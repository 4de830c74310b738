"""RWKV-6 and RWKV-7 as llama.cpp has them in GGUF files, brought to the official names and values.

Sources: llama.cpp, conversion/rwkv.py (what is fused, turned and scaled) and src/models/rwkv6*.cpp, rwkv7*.cpp.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import UnsupportedModelError
from rwkv_cli.models.config import Config
from rwkv_cli.quant import Source, SourceTensor
from rwkv_cli.quant.ggml import Blocks
from rwkv_cli.quant.source import Computed, reshaped, rows_of, turned

ARCHITECTURE = "general.architecture"
"""The key that every GGUF file has."""

_SHARED = [
    (r"^token_embd\.", "emb."),
    (r"^token_embd_norm\.", "blocks.0.ln0."),
    (r"^output_norm\.", "ln_out."),
    (r"^output\.", "head."),
    (r"^blk\.", "blocks."),
    (r"\.attn_norm\.", ".ln1."),
    (r"\.attn_norm_2\.", ".ln2."),
    (r"\.time_mix_ln\.", ".att.ln_x."),
    (r"\.time_mix_(receptance|key|value|gate|output)\.", r".att.\1."),
    (r"\.channel_mix_(receptance|key|value)\.", r".ffn.\1."),
]

_NAMES = {
    "rwkv6": [
        *_SHARED,
        (r"\.time_mix_lerp_(\w+)\.weight$", r".att.time_maa_\1"),
        (r"\.channel_mix_lerp_([kr])\.weight$", r".ffn.time_maa_\1"),
        (r"\.time_mix_(w[12])\.weight$", r".att.time_maa_\1"),
        (r"\.time_mix_(decay\w*)\.weight$", r".att.time_\1"),
        (r"\.time_mix_first\.weight$", ".att.time_faaaa"),
    ],
    "rwkv7": [
        *_SHARED,
        (r"\.time_mix_lerp_(\w+)\.weight$", r".att.x_\1"),
        (r"\.channel_mix_lerp_k\.weight$", ".ffn.x_k"),
        (r"\.time_mix_([wavg][012]|k_k|k_a|r_k)\.weight$", r".att.\1"),
    ],
}

_FUSED = {"rwkv6": "wkvrg", "rwkv7": "rwkvag"}
"""The order of the mixes in `lerp_fused`."""

_TURNED = r"\.att\.(time_maa_w[12]|time_decay_w[12]|[wavg][12])$"
"""The official names of low-rank factors, which lie turned there."""


class Official(NamedTuple):
    """A GGUF file's model in the official form."""

    tensors: dict[str, SourceTensor]
    settings: dict[str, Any]
    """The fields that a config.json would have."""


def official(source: Source, metadata: Mapping[str, Any]) -> Official:
    """The official tensors and settings. Raises UnsupportedModelError for another architecture than RWKV-6 and 7."""
    architecture = metadata[ARCHITECTURE]
    if not isinstance(architecture, str) or architecture not in _NAMES:
        raise UnsupportedModelError(
            f"a GGUF file of the architecture {architecture!r:.40}; of these, rwkv6 and rwkv7 are supported"
        )
    shifts = metadata.get(f"{architecture}.token_shift_count", 2)
    if shifts != 2:
        raise _refused(f"{architecture}.token_shift_count", shifts, "RWKV shifts tokens twice in a layer")
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in source.items():
        for pattern, to in _NAMES[architecture]:
            name = re.sub(pattern, to, name)
        tensors |= _parts(architecture, name, tensor)
    for name in [name for name in tensors if name.endswith(".r_k")]:
        size = metadata.get(f"{architecture}.wkv.head_size")
        width, *others = tensors[name].shape
        if type(size) is not int or others or size < 1 or width % size:
            raise _refused(f"{architecture}.wkv.head_size", size, f"{name} has the shape {list(tensors[name].shape)}")
        tensors[name] = reshaped(tensors[name], (width // size, size))
    scaled = dict(_scaled(tensors, architecture, metadata))
    eps = metadata.get(f"{architecture}.attention.layer_norm_epsilon")
    return Official(tensors | scaled, {"norm_eps": eps})


def check(config: Config, metadata: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for a file whose metadata says other dimensions than its tensors have."""
    dimensions = {
        "block_count": config.layers,
        "embedding_length": config.width,
        "feed_forward_length": config.ffn,
        "wkv.head_size": config.head_size,
        "time_mix_extra_dim": config.ranks.get("mix"),
        "time_decay_extra_dim": config.ranks.get("decay"),
        "attention.decay_lora_rank": config.ranks.get("w"),
        "attention.iclr_lora_rank": config.ranks.get("a"),
        "attention.gate_lora_rank": config.ranks.get("g"),
        "attention.value_residual_mix_lora_rank": config.ranks.get("v") if config.layers > 1 else None,
    }
    for key, found in dimensions.items():
        key = f"{metadata[ARCHITECTURE]}.{key}"
        if found is not None and metadata.get(key, found) != found:
            raise _refused(key, metadata[key], f"its tensors have {found}")


def _parts(architecture: str, name: str, tensor: SourceTensor) -> Iterator[tuple[str, SourceTensor]]:
    """The official tensors that one stands for, where only the name was brought to the official one."""
    if name.endswith("_fused"):
        mixes = _FUSED[architecture]
        if isinstance(tensor, Blocks) or tensor.shape[0] != len(mixes):
            raise UnsupportedModelError(f"tensor {name} is quantized or does not hold the mixes of {', '.join(mixes)}")
        for x, part in zip(mixes, rows_of(tensor), strict=True):
            yield name.removesuffix("fused") + x, part
    elif re.search(_TURNED, name) and len(tensor.shape) > 1:
        yield name, turned(tensor)
    else:
        yield name, tensor


def _scaled(tensors: Source, architecture: str, metadata: Mapping[str, Any]) -> Iterator[tuple[str, SourceTensor]]:
    """The matrices that the file has halved every few layers, as they were.

    llama.cpp halves the residual stream as often, which changes nothing but that float16 does not overflow.
    """
    key = f"{architecture}.rescale_every_n_layers"
    every = metadata.get(key, 0)
    if type(every) is not int or every < 0 or (every and architecture != "rwkv6"):
        raise _refused(key, every, "only RWKV-6 is known to have it")
    for name, tensor in tensors.items():
        found = re.match(r"blocks\.(\d{1,4})\.(att\.output|ffn\.value)\.weight$", name)
        if every and found and int(found[1]) >= every:
            yield name, Computed.from_each(tensor, partial(_doubled, int(found[1]) // every))


def _doubled(times: int, a: NDArray[np.float32]) -> NDArray[np.float32]:
    """The numbers, doubled so many times. Conversion refuses what overflows."""
    with np.errstate(over="ignore"):
        return np.ldexp(a, times)


def _refused(key: str, value: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"its metadata has {key} {value!r:.40}, but {why}")
