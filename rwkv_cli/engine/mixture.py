"""A mixture of formats for an average number of bits: tensors whose rounding changes most keep more of them.

The KL that small independent errors cost adds up, and it grows with their squares. So each kind of tensor is rounded
alone and in one format, and the squared errors of the other formats tell what these would cost.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.bars import CHOOSING, Bars
from rwkv_cli.engine.model import obey
from rwkv_cli.engine.recipes import LADDER, mixed_kind
from rwkv_cli.engine.rounding import encoded, stored
from rwkv_cli.engine.scoring import differences, rows_together
from rwkv_cli.errors import FormatError
from rwkv_cli.models import Model
from rwkv_cli.models.base import chunks
from rwkv_cli.quant.dtypes import nearest, to_float32
from rwkv_cli.quant.formats import Floats, relaid
from rwkv_cli.quant.formats.contract import Shape
from rwkv_cli.quant.unconverted import Unconverted
from rwkv_cli.quant.writer import Contents, Planned

_MEASURED = "q4"
"""The format that each kind is measured in: errors of 4 bits are those that matter."""
_TOKENS = 512
"""The most tokens that a kind is measured on."""

Formats = Mapping[str, str]
"""The format of each kind of tensor."""


class Option(NamedTuple):
    """One format for the tensors of one kind."""

    format: str
    bytes: int
    kl: float


def with_formats(contents: Contents, formats: Formats) -> Contents:
    """The contents with their quantized tensors in these formats, but for those that are kept."""
    plan = [
        replace(planned, layout=relaid(planned.layout, formats[mixed_kind(planned.name)]))
        if _free(planned)
        else planned
        for planned in contents.plan
    ]
    return replace(contents, plan=plan)


def with_lowest(contents: Contents) -> Contents:
    """The contents with the fewest bits that a mixture may give their tensors."""
    return with_formats(contents, defaultdict(lambda: LADDER[0]))


def bounds(contents: Contents) -> tuple[float, float]:
    """The least and the most bits a weight that a mixture can have."""
    sizes = [_bytes(planned) for planned in contents.plan]
    low, high = (sum(most(each.values()) for each in sizes) for most in (min, max))
    return low * 8 / contents.weights, high * 8 / contents.weights


def check_bits(contents: Contents, bits: float) -> None:
    """Raise FormatError for a number of bits that no mixture has."""
    low, high = bounds(contents)
    first, last = np.ceil(low * 100) / 100, np.floor(high * 100) / 100
    if not low <= bits <= high:
        raise FormatError(
            f"--bits {bits:g}: the weights of this model take {first:.2f} to {last:.2f}; give one of these"
        )


def mixed(contents: Contents, bits: float, source: Model, ids: NDArray[np.int64], bar: Bars) -> Contents:
    """The contents in those formats that cost the least KL on a text and take at most so many bits a weight.

    `source` is the model with the source's own values. Raises FormatError as `check_bits`.
    """
    check_bits(contents, bits)
    options = measure(contents, source, ids[:_TOKENS], bar)
    fixed = sum(planned.stored_bytes for planned in contents.plan if not _free(planned))
    return with_formats(contents, choose(options, int(bits * contents.weights / 8) - fixed))


def measure(contents: Contents, source: Model, ids: NDArray[np.int64], bar: Bars) -> dict[str, list[Option]]:
    """The bytes and the KL of each kind in each format. The source and each kind take one pass over the text.

    Memory holds the source's logits, and the weights of one kind.
    """
    kinds: dict[str, list[Planned]] = {}
    for planned in contents.plan:
        if _free(planned):
            kinds.setdefault(mixed_kind(planned.name), []).append(planned)
    options = {}
    with bar(CHOOSING, (len(kinds) + 1) * len(ids)) as progress:
        expected = []
        for logits in _passes(source, ids):
            expected.append(logits)
            progress(len(logits))
        for kind, tensors in kinds.items():
            total, at = 0.0, 0
            file = _Rounded(contents, tensors)
            for logits, exact in zip(_passes(Model(file), ids), expected, strict=True):
                part = ids[at : at + len(logits)]  # the losses of any tokens do, since only the KL is taken
                _, _, kl, _ = differences(source, [logits, exact], part)
                total, at = total + float(kl.sum()), at + len(part)
                progress(len(part))
            errors, sizes = file.errors, [_bytes(planned) for planned in tensors]
            each = total / len(ids) / max(errors[_MEASURED], 1e-30)
            options[kind] = [Option(f, sum(size[f] for size in sizes), each * errors[f]) for f in LADDER]
    return options


def choose(options: Mapping[str, Sequence[Option]], room: int) -> dict[str, str]:
    """The format of each kind so that the KL of all is the least of all choices whose bytes fit into `room`."""
    best: list[tuple[int, float, tuple[str, ...]]] = [(0, 0.0, ())]
    least = {kind: min(option.bytes for option in each) for kind, each in options.items()}
    left = sum(least.values())
    for kind, each in options.items():
        left -= least[kind]
        sums = sorted(
            (size + option.bytes, kl + option.kl, (*formats, option.format))
            for size, kl, formats in best
            for option in each
            if size + option.bytes + left <= room
        )
        best = []
        for choice in sums:  # a larger one is kept only if it costs less
            if not best or choice[1] < best[-1][1]:
                best.append(choice)
    return dict(zip(options, best[-1][2], strict=True))


def _free(planned: Planned) -> bool:
    """True for a tensor whose format a mixture chooses."""
    return planned.format.QUANTIZED and not planned.kept


def _bytes(planned: Planned) -> dict[str, int]:
    """The bytes of a tensor in each format."""
    if not _free(planned):
        return dict.fromkeys(LADDER, planned.stored_bytes)
    return {f: replace(planned, layout=relaid(planned.layout, f)).stored_bytes for f in LADDER}


def _passes(model: Model, ids: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    """The logits after all tokens of a text, some rows at a time."""
    state = model.new_state()
    for part in chunks(len(ids), rows_together(model)):
        yield model.advance(ids[part], state, all_logits=True, watch=obey)


class _Rounded(Unconverted):
    """The source's own values, but for tensors of one kind, which are rounded."""

    def __init__(self, contents: Contents, tensors: Sequence[Planned]) -> None:
        super().__init__(contents)
        self._rounded = {planned.name: planned for planned in tensors}
        self.errors = dict.fromkeys(LADDER, 0.0)
        """The squared error of each format, on the first rows of each tensor that was read."""

    def tensor(self, name: str, shape: Shape) -> Floats:
        """The tensor in the source's dtype."""
        exact = super().tensor(name, shape)
        if name not in self._rounded:
            return exact
        planned = self._rounded[name]
        for f in LADDER:
            tried = replace(planned, layout=relaid(planned.layout, f))
            start, stop = tried.blocks()[0]
            self.errors[f] += encoded(tried, to_float32(exact.bits[start:stop], exact.dtype)).squared_error
        planned = replace(planned, layout=relaid(planned.layout, _MEASURED))
        bits = np.empty_like(exact.bits)
        for start, stop in planned.blocks():
            values = stored(planned, to_float32(exact.bits[start:stop], exact.dtype))
            bits[start:stop] = nearest(values, exact.dtype)
        return replace(exact, bits=bits)
