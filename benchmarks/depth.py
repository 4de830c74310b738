"""Measure reading at growing depths of a text, in CPU seconds of one thread, which other work hardly changes."""

import time
from collections.abc import Iterator, Sequence
from typing import Protocol, TypedDict

TOKENS, REPETITIONS = 8, 5
"""Tokens that are timed together, and how often. The least time counts."""
CHUNK = 512
"""Tokens that are read together."""


class Reader(Protocol):
    """A model with its memory of a text."""

    depth: int
    """Tokens that it holds."""

    def read(self, tokens: int) -> None:
        """Read on, up to `CHUNK` tokens. The logits after the last one are computed."""

    def memory(self) -> int:
        """The bytes that hold what was read."""

    def grow(self, depth: int) -> bool:
        """Come to a depth without reading, if that is possible."""


class Row(TypedDict):
    """The figures of one depth."""

    depth: int
    token: float
    """Seconds of the next token."""
    memory: int
    read: float | None
    """Seconds of reading up to here. None where it did not read all."""


def measure(reader: Reader, seconds: float, depths: Sequence[int]) -> Iterator[Row]:
    """Measure at each depth. The model reads for some seconds; then it grows, or that is all."""
    spent, whole = 0.0, True
    for depth in depths:
        while reader.depth < depth and spent < seconds:
            began = time.process_time()
            reader.read(min(CHUNK, depth - reader.depth))
            spent += time.process_time() - began
        if reader.depth < depth:
            whole = False
            if not reader.grow(depth):
                return
        times = []
        for _ in range(REPETITIONS):
            began = time.process_time()
            for _ in range(TOKENS):
                reader.read(1)
            times.append((time.process_time() - began) / TOKENS)
        read = spent if whole else None
        yield {"depth": depth, "token": min(times), "memory": reader.memory(), "read": read}
