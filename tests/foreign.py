"""Writers of files of llama.cpp (GGUF) and rwkv.cpp, by what their own converters do."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny

TOKENS = ["<s>", "a", "b", "\\n\\n", "\\xe4\\xbd", "it\\'s", 'b"', "\\\\", "é"]
DTYPES = {"F32": np.float32, "F16": np.float16}
KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 7, "Q5_1": 8, "Q8_0": 9}
LOW_RANKS = ("maa_w1", "maa_w2", "decay_w1", "decay_w2", *(f".{x}{i}" for x in "wavg" for i in "12"))


def llama_tensors(version: str, weights: tiny.Tensors, rescale: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors that llama.cpp's conversion/rwkv.py makes, by their names in the file."""
    out: dict[str, np.ndarray[Any, Any]] = {}
    top = {"emb.": "token_embd.", "blocks.0.ln0.": "token_embd_norm.", "ln_out.": "output_norm.", "head.": "output."}
    mixes, x_ = ("wkvrg", "time_maa_") if version == "6" else ("rwkvag", "x_")
    for name, array in weights.items():
        for old, new in top.items():
            if name.startswith(old):
                out[new + name.removeprefix(old)] = array
        if not name.startswith("blocks.") or ".ln0." in name:
            continue
        _, layer, *parts = name.split(".")
        part, blk = ".".join(parts), f"blk.{layer}."
        if part.startswith(("ln1.", "ln2.")):
            out[blk + part.replace("ln1", "attn_norm").replace("ln2", "attn_norm_2")] = array
        elif part.startswith("att.ln_x"):
            out[blk + "time_mix_ln." + parts[-1]] = array
        elif part.endswith(".weight"):
            where = {"att": "time_mix_", "ffn": "channel_mix_"}[parts[0]] + parts[1] + ".weight"
            halved = rescale and part in ("att.output.weight", "ffn.value.weight")
            out[blk + where] = array / 2 ** (int(layer) // rescale) if halved else array
        elif part.startswith(f"ffn.{x_}"):
            out[blk + f"channel_mix_lerp_{part[-1]}.weight"] = array.reshape(-1)
        elif part == "att.time_maa_x":
            out[blk + "time_mix_lerp_x.weight"] = array.reshape(-1)
        elif part == f"att.{x_}{mixes[0]}":
            fused = [weights[f"blocks.{layer}.att.{x_}{x}"].reshape(1, 1, -1) for x in mixes]
            out[blk + "time_mix_lerp_fused.weight"] = np.stack(fused)
        elif not part.startswith(f"att.{x_}") or part[-1] in "12":
            new = parts[1].replace("time_faaaa", "first").replace("time_maa_", "").replace("time_", "")
            if part[-1] in "12":
                array = np.ascontiguousarray(np.swapaxes(array, -1, -2))
            else:
                array = array.reshape(-1) if new != "first" else array
            if version == "7" and layer == "0" and new.startswith("a"):
                out[blk + f"time_mix_v{new[1]}.weight"] = array  # dummies that are not used
            if not (version == "7" and layer == "0" and new in ("v0", "v1", "v2")):
                out[blk + f"time_mix_{new}.weight"] = array
    return out


def write_gguf(
    path: Path, version: str, weights: tiny.Tensors, kind: str = "F32", *, rescale: int = 0, **changes: Any
) -> Path:
    """A GGUF file with matrices of a kind. `changes` are metadata that replace or, if None, remove what belongs there.

    A dot in a key is written as two underscores.
    """
    arch, width = f"rwkv{version}", weights["emb.weight"].shape[1]
    vocab, layers = len(weights["emb.weight"]), sum(name.endswith("ln1.weight") for name in weights)
    fields: dict[str, Any] = {
        f"{arch}.context_length": 1048576,
        f"{arch}.embedding_length": width,
        f"{arch}.block_count": layers,
        f"{arch}.feed_forward_length": len(weights["blocks.0.ffn.key.weight"]),
        f"{arch}.attention.layer_norm_epsilon": 1e-5,
        f"{arch}.wkv.head_size": 16,
        f"{arch}.rescale_every_n_layers": rescale,
        f"{arch}.attention.head_count": 0,
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.tokens": TOKENS + [f"[PAD{i}]" for i in range(len(TOKENS), vocab)],
        "tokenizer.ggml.token_type": [3] + [1] * (len(TOKENS) - 1) + [5] * (vocab - len(TOKENS)),
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.chat_template": "rwkv-world",
    }
    fields |= {key.replace("__", "."): value for key, value in changes.items()}
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", arch))
    for key, value in fields.items():
        if key == "general.alignment" and value == 64:
            writer.add_custom_alignment(value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, array in llama_tensors(version, weights, rescale).items():
        matrix = array.ndim == 2 and not any(x in name for x in ("_w", "_a", "_v", "_g", "_lerp", "_first"))
        matrix |= name.endswith(("value.weight", "gate.weight"))
        if matrix and kind not in DTYPES:
            chosen = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(array, chosen), raw_dtype=chosen)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array, DTYPES[kind] if matrix else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(version: str, weights: tiny.Tensors) -> tiny.Tensors:
    """As rwkv.cpp's convert_pytorch_to_ggml.py does it."""
    out: tiny.Tensors = {}
    heads = len(weights.get("blocks.0.att.time_faaaa", weights.get("blocks.0.att.time_decay", ())))
    for name, array in weights.items():
        if ".att.x_" in name:
            name = name[: name.index("x_")] + "x_rwkvag"
            out[name] = np.concatenate([out[name], array]) if name in out else array
            continue
        array = array.squeeze() if ".time_" in name else array
        if name.endswith(LOW_RANKS):
            array = np.swapaxes(array, -1, -2)
        elif name.endswith("time_decay"):
            if version == "4":
                array = -np.exp(array)
            elif version == "6":
                array = array.reshape(heads, -1, 1)
            else:
                array = np.exp(-np.exp(array))
                array = array[..., None] if version == "5.2" else array.reshape(-1, 1, 1)
        elif name.endswith("time_faaaa"):
            array = array[..., None]
        elif name.endswith("time_first") and version == "5.0":
            array = np.exp(array).reshape(-1, 1, 1)
        out[name] = array
    return out


def write_bin(path: Path, version: str, weights: tiny.Tensors, kind: str = "F32", form: int = 101) -> Path:
    """An rwkv.cpp file. What rwkv.cpp quantizes is of the kind, and the rest is float32."""
    layers = sum(name.endswith("ln1.weight") for name in weights)
    data = struct.pack("<6I", 0x67676D66, form, *weights["emb.weight"].shape, layers, KINDS[kind])
    for name, array in stored(version, weights).items():
        matrix = array.ndim == 2 and (kind == "F16" or not name.startswith(("emb", "head")))
        small = (".k_k", ".k_a", ".r_k", ".x_", ".w0", ".a0", ".v0", *(f".{x}{i}" for x in "wavg" for i in "12"))
        matrix &= not any(part in name for part in (".time_", *small)) or (version == "6" and name.endswith(LOW_RANKS))
        chosen = kind if matrix and array.shape[-1] % 32 == 0 else "F32"
        data += struct.pack("<3I", array.ndim, len(name), KINDS[chosen])
        data += struct.pack(f"<{array.ndim}I", *array.shape[::-1]) + name.encode()
        if chosen in ("F32", "F16"):
            data += array.astype("<f4" if chosen == "F32" else "<f2").tobytes()
        else:
            data += gguf.quantize(np.ascontiguousarray(array), gguf.GGMLQuantizationType[chosen]).tobytes()
    path.write_bytes(data)
    return path
