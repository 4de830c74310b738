"""The fields of a Hugging Face folder's config.json that change the mathematics of a model.

Each field that changes a result is honoured or refused by its name. All others are ignored.

Sources: transformers 4.46, models/rwkv/modeling_rwkv.py (v4); the remote code of RWKV/rwkv-5-world and
RWKV/rwkv-6-world; flash-linear-attention, layers/rwkv7.py and models/rwkv7; transformers-rwkv, models/rwkv7.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rwkv_cli.errors import UnsupportedModelError
from rwkv_cli.models.config import Config
from rwkv_cli.quant import SourceTensor, Zeros

_EPS = 1e-5
"""The eps of norms where the folder does not say another."""

_ACTIVATIONS = {"sqrelu": "relu_squared", "relu2": "relu_squared", "silu": "silu", "swish": "silu"}
"""The names of activations there and here."""

Tensors = dict[str, SourceTensor]


def honoured(config: Config, tensors: Tensors, settings: Mapping[str, Any], *, fla: bool) -> tuple[Config, Tensors]:
    """The config and the tensors of a model as its config.json changes them.

    `fla` says that the tensors have the names of flash-linear-attention, whose group norm has an eps of its own.
    Raises UnsupportedModelError, with the name of the field, for what the model here cannot do.
    """
    _check_widths(config, settings)
    _check_structure(settings)
    name = "layer_norm_epsilon" if "layer_norm_epsilon" in settings else "norm_eps"
    eps = _number(settings, name, _EPS)
    if fla:
        group_eps = eps * config.head_size if config.version == "7" else eps
    elif "group_norm_epsilon" in settings:
        group_eps = _number(settings, "group_norm_epsilon", _EPS)
    elif "head_size_divisor" in settings:
        group_eps = _EPS * _number(settings, "head_size_divisor", 8.0) ** 2
    else:
        group_eps = config.group_norm_eps
    changes: dict[str, Any] = {"norm_eps": eps, "group_norm_eps": group_eps}
    if "layer_norm_epsilon" in settings and config.version != "7" and eps != _EPS:
        changes["output_norm_eps"] = _EPS  # their ln_out has PyTorch's own eps
    activation = settings.get("hidden_act") or "sqrelu"
    changes["ffn_activation"] = _ACTIVATIONS.get(activation) if isinstance(activation, str) else None
    if changes["ffn_activation"] is None or (changes["ffn_activation"] == "silu" and config.version != "7"):
        raise _refused("hidden_act", activation, "the channel mixing here has squared ReLU, and RWKV-7 also SiLU")
    fused, tied = (settings.get(name) is True for name in ("embedding_layer_norm_fused", "tie_word_embeddings"))
    if fused and tied:
        raise _refused("tie_word_embeddings", True, "the head cannot be an embedding that has its norm in it")
    tensors = dict(tensors)
    if fused:
        changes |= {"embedding_normed": True, "embedding_dtype": "F32"}
        for part in ("weight", "bias"):
            tensors.pop(f"blocks.0.ln0.{part}", None)
    if tied:
        tensors["head.weight"] = tensors["emb.weight"]
    if settings.get("norm_bias") is False:
        for weight in [name for name in tensors if _is_norm(name)]:
            bias = weight.removesuffix("weight") + "bias"
            tensors.setdefault(bias, Zeros.beside(tensors[weight], tensors[weight].shape))
    try:
        return Config.from_json(replace(config, **changes).as_json()), tensors
    except ValueError as error:
        raise UnsupportedModelError(f"its config.json does not do: {error}") from None


def _is_norm(name: str) -> bool:
    """Return true for the weight of a layer norm or group norm."""
    return name.endswith((".ln0.weight", ".ln1.weight", ".ln2.weight", ".ln_x.weight")) or name == "ln_out.weight"


def _number(settings: Mapping[str, Any], name: str, default: float) -> float:
    """A positive number of the settings."""
    value = settings.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 < value < 1e6:
        raise _refused(name, value, "it must be a positive number")
    return float(value)


def _check_widths(config: Config, settings: Mapping[str, Any]) -> None:
    """Refuse an attention that is wider or narrower than the model."""
    for name in ("attention_hidden_size", "value_dim", "key_dim"):
        value = settings.get(name)
        for width in value if isinstance(value, list) else [value]:
            if width not in (None, config.width):
                raise _refused(name, value, f"only the width of the model ({config.width}) is supported")


def _check_structure(settings: Mapping[str, Any]) -> None:
    """Refuse models with other layers than the official ones."""
    if settings.get("attn") is not None:
        raise _refused("attn", settings["attn"], "a mixture with attention layers is not supported")
    if settings.get("norm_first") is False:
        raise _refused("norm_first", False, "a model without the norm after its embedding is not supported")


def check_unquantized(settings: Mapping[str, Any]) -> None:
    """Refuse a folder of weights that are quantized already. Its tensors need not be floats, so this comes first."""
    for name in ("quantization_config", "quantization"):
        found = settings.get(name)
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else None
            kind = method if isinstance(method, str) else "MLX" if name == "quantization" else "unknown"
            raise UnsupportedModelError(
                f"its weights are quantized already (config.json: {name}, {kind:.40}); convert the original model"
            )


def _refused(name: str, value: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"its config.json has {name} {value!r:.60}, but {why}")
