"""Writes converted files with random weights that are spread as those of trained models are, for benchmarks."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

RNG = np.random.default_rng(0)
NOISE = RNG.integers(-127, 128, 1 << 24, np.int8)
"""Numbers whose pieces are weights, codes or their scales."""
DEVIATION = 73.0
"""Their standard deviation."""
SIZES = {"I8": 1, "U8": 1, "F16": 2, "F32": 4}
CODES = ("q6", "q5", "q4")


def vector(version: str, name: str, shape: tuple[int, ...]) -> Any:
    """Values of a float tensor as those of trained models are spread."""
    base = name.split(".")[-1]
    if base == "weight":
        return RNG.uniform(0.7, 1.3, shape)
    if base == "bias":
        return RNG.normal(0, 0.05, shape)
    if base == "time_decay":
        rate = RNG.uniform(-6, 1, shape)
        return -np.exp(rate) if version == "4" else rate if version == "6" else np.exp(-np.exp(rate))
    if base in ("w0", "a0", "v0"):
        return RNG.uniform({"w0": -6, "a0": -1, "v0": -1}[base], 1, shape)
    if base in ("time_faaaa", "time_first", "r_k"):
        return RNG.normal(0, 0.2, shape)
    if base in ("k_k", "k_a"):
        return RNG.uniform(0.8, 1.1, shape)
    return RNG.uniform(0, 1, shape)  # the mixes


def spread(format: Any, layout: str, fan_in: int) -> tuple[dict[str, Any], float]:
    """The facts and the factor that give noise in a format the spread of trained weights."""
    from rwkv_cli.numbers import LEVELS

    target = 0.5 if layout.startswith("rows") else 1 / math.sqrt(fan_in)
    if format.NAME == "int8":
        scale = target / DEVIATION
        unit = math.floor(math.log2(scale)) - 14
        return {"unit": unit}, scale / 2.0**unit
    if format.NAME == "float":
        return {}, target / DEVIATION
    return {}, target / DEVIATION / float(np.std(LEVELS[format.bits]))


def write_model(path: Path, config: Any, quant: str = "int8") -> int:
    """Write a converted file with random weights, and return how many bytes of matrices a token reads.

    Weights that stay float are float16.
    """
    from rwkv_cli.engine.recipes import RECIPES
    from rwkv_cli.models.registry import tensors
    from rwkv_cli.quant.formats import FORMATS
    from rwkv_cli.quant.formats.contract import Spec

    layouts: dict[str, Any] = {}
    # name, dtype, shape; values, or the factor of noise in float16, or None for noise
    pieces: list[tuple[str, str, tuple[int, ...], Any]] = []
    read = 0
    for name, entry in tensors(config).items():
        if entry.optional:
            continue
        if entry.kind == "vector":
            pieces.append((name, "F32", entry.shape, vector(config.version, entry.name, entry.shape).astype("<f4")))
            layouts[name] = {"layout": "vector", "shape": list(entry.shape)}
            continue
        format = FORMATS[RECIPES[quant].format_of(name)]
        layout = format.LAYOUTS[entry.kind]
        facts, factor = spread(format, layout, entry.shape[1])
        layouts[name] = {"layout": layout, "shape": list(entry.shape), **facts}
        for suffix, part in zip(format.SUFFIXES, format.parts(Spec(layout, entry.shape, "F16")), strict=True):
            values: Any = None
            if layout == "float":
                values = factor
            elif part.dtype.startswith("F"):
                last = (factor * RNG.uniform(0.8, 1.2, part.shape[-1])).astype(f"<f{SIZES[part.dtype]}")
                values = np.broadcast_to(last, part.shape)
            pieces.append((name + suffix, part.dtype, part.shape, values))
            read += 0 if layout.startswith("rows") else SIZES[part.dtype] * math.prod(part.shape)
    metadata = {
        "format": "rwkv", "format_version": "1", "digest": "", "config": json.dumps(config.as_json()),
        "tensors": json.dumps(layouts), "quantization": json.dumps(quant), "tokenizer": '"none"', "template": '"plain"',
        "source": '"random"',
    }  # fmt: skip
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, dtype, shape, _ in pieces:
        end = at + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, shape, values in pieces:
            if isinstance(values, np.ndarray):
                file.write(np.ascontiguousarray(values).tobytes())
                continue
            left, start = math.prod(shape), int(RNG.integers(1 << 20))
            while left:
                piece = NOISE[start : start + left]
                file.write((piece if values is None else (piece * np.float32(values)).astype("<f2")).tobytes())
                left, start = left - len(piece), 0
    return read


def config_of(version: str, layers: int, width: int, head: int, vocab: int, ranks: dict[str, int]) -> Any:
    from rwkv_cli.models import Config

    heads, size = (1, width) if version == "4" else (width // head, head)
    return Config(version, layers, width, vocab, heads, size, 4 * width if version >= "7" else 7 * width // 2, ranks)


def ranks_of(version: str, rank: int) -> dict[str, int]:
    """Ranks of a small model."""
    ranks = {"w": rank, "a": rank, "v": rank // 2, "g": 2 * rank}
    of = {"6": {"mix": rank, "decay": 2 * rank}, "7": ranks, "7a": ranks | {"s": rank}, "8-rc00": ranks}
    return of.get(version, {})
