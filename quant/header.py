"""The header of a converted file: the version of the format, the metadata and the places of the arrays."""

import json
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from rwkv_cli.quant.dtypes import BITS
from rwkv_cli.quant.formats.contract import Part, Shape

FORMAT_VERSION = 1
"""The version of the file format, raised when a reader of the old one could misread the new one."""

_ALIGN = 64
_WIDEST_FACTS = {"unit": -999, "error": 1.234e-300, "effect": 1.234e-300}
_WIDEST_START = 10**15
_WIDEST_DIGEST = "sha256:" + "0" * 64


class Place(NamedTuple):
    """One array of the file."""

    dtype: str
    shape: Shape
    start: int
    """The first byte, counted from the end of the header."""

    @property
    def stop(self) -> int:
        return self.start + size_of(Part(self.dtype, self.shape))


def size_of(part: Part) -> int:
    """Bytes of an array."""
    return prod(part.shape) * BITS[part.dtype].itemsize


def places(parts: Mapping[str, Part]) -> dict[str, Place]:
    """The place of each array, in the order of the file."""
    found, start = {}, 0
    for name in sorted(parts, key=lambda name: _rank(parts[name])):
        found[name] = Place(*parts[name], start)
        start = found[name].stop
    return found


def _rank(part: Part) -> tuple[int, bool]:
    """Sort key that starts every large matrix at a multiple of 64 bytes and any other array at one of its own element.

    Arrays of bytes that do not add up to a multiple of 64, such as tables, come behind the others. Those that do not
    even add up to a float32 come last, with the tokenizer.
    """
    size = prod(part.shape)
    if part.dtype in ("I8", "U8") and len(part.shape) > 1 and size % 4 == 0:
        return 0, size % _ALIGN != 0
    return {"F32": 1, "I8": 3, "U8": 3}.get(part.dtype, 2), False


class Header(NamedTuple):
    """A header before the tensors are written, when it still lacks the facts that only their numbers tell."""

    places: Mapping[str, Place]
    tensors: Mapping[str, Mapping[str, Any]]
    """The facts of each tensor that are known before it is written."""
    metadata: Mapping[str, Any]
    """Values that become JSON."""

    def room(self) -> int:
        """Bytes before the first array: the header with the widest numbers that it can come to hold, aligned."""
        wide = self._replace(places={name: place._replace(start=_WIDEST_START) for name, place in self.places.items()})
        size = 8 + len(wide._text(dict.fromkeys(self.tensors, _WIDEST_FACTS), _WIDEST_DIGEST))
        return -(-size // _ALIGN) * _ALIGN

    def encoded(self, facts: Mapping[str, Mapping[str, Any]], digest: str, room: int) -> bytes:
        """The header in all of its `room`, with the facts about each tensor that writing it brought."""
        text, room = self._text(facts, digest), room - 8
        assert len(text) <= room, "the header outgrew its room"
        return room.to_bytes(8, "little") + text.ljust(room)

    def _text(self, facts: Mapping[str, Mapping[str, Any]], digest: str) -> bytes:
        tensors = {name: {**known, **facts[name]} for name, known in self.tensors.items()}
        header: dict[str, Any] = {
            "__metadata__": {
                "format": "rwkv",
                "format_version": str(FORMAT_VERSION),
                "digest": digest,
                **{key: _compact(value) for key, value in {"tensors": tensors, **self.metadata}.items()},
            }
        }
        for name, place in self.places.items():
            header[name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": [place.start, place.stop]}
        return _compact(header).encode()


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
