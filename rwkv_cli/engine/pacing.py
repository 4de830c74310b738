"""The parts in which a prompt is read. Between two of them progress is shown, and Ctrl-C is obeyed."""

import time
from collections.abc import Iterator

from rwkv_cli.models import Model
from rwkv_cli.models.base import chunks

_SECONDS = 0.8
"""The time that a part should take."""
_FIRST = 6
"""Tokens of the first part, whose speed is not known."""
_BLOCK = 12
"""Longer parts are multiples of this: matrix products take 4 or 6 tokens together."""


def paced(tokens: int, model: Model) -> Iterator[slice]:
    """Yield slices of a text's tokens. The caller reads each before it asks for the next one.

    The length of a slice follows from the speed of the one before. Where a device's results depend on such lengths,
    slices are as long as a pass.
    """
    if not model.backend.any_split:
        yield from chunks(tokens, model.backend.chunk)
        return
    at, length = 0, _FIRST
    while at < tokens:
        part = slice(at, min(at + length, tokens))
        begin = time.perf_counter()
        yield part
        seconds = time.perf_counter() - begin
        wanted = int(_SECONDS * (part.stop - at) / max(seconds, 1e-9))
        length = min(max(wanted // _BLOCK * _BLOCK or wanted, 1), model.backend.chunk)
        at = part.stop
