"""Formats of stored weights, one module each, and the table of them."""

from rwkv_cli.quant.formats import float as float_
from rwkv_cli.quant.formats import int8
from rwkv_cli.quant.formats.contract import Format, Kind
from rwkv_cli.quant.formats.float import Floats as Floats
from rwkv_cli.quant.formats.int8 import Int8 as Int8
from rwkv_cli.quant.formats.packed import Packed as Packed
from rwkv_cli.quant.formats.packed import PackedFormat

FORMATS: dict[str, Format] = {
    "int8": int8,
    "q6": PackedFormat(6),
    "q5": PackedFormat(5),
    "q4": PackedFormat(4),
    "none": float_,
}
"""Formats by the names that `--quant` and the metadata `quantization` have for them."""

StoredTensor = Int8 | Packed | Floats
"""A tensor as one of the formats reads it."""


def format_of(layout: object) -> Format | None:
    """The format with this layout, or None for anything that is no layout."""
    return next((format for format in FORMATS.values() if layout in format.LAYOUTS.values()), None)


def layout_for(kind: Kind, quantization: str) -> str:
    """The layout of a tensor. A kind that the format does not take stays float."""
    return FORMATS[quantization].LAYOUTS.get(kind) or float_.LAYOUTS[kind]


def relaid(layout: str, quantization: str) -> str:
    """The layout that a tensor of this one has in another format."""
    format = format_of(layout)
    assert format is not None, layout
    return next(layout_for(kind, quantization) for kind, each in format.LAYOUTS.items() if each == layout)


def takes(layout: str, kind: Kind) -> bool:
    """Return true if tensors of this kind are stored in this layout by some format."""
    return any(format.LAYOUTS.get(kind) == layout for format in FORMATS.values())
