"""Displays of how far long work is."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Bar = Callable[[int], AbstractContextManager[Callable[[int], object]]]
"""A function of how many bytes there are to do. Its block wraps the work and gets a function to call with those just
done."""

Bars = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""A bar for each part of the work, by its label."""

WRITING, KEEPING, CHOOSING, MEASURING = "Writing a text", "Judging matrices", "Choosing formats", "Measuring"
OF_TOKENS = WRITING, KEEPING, CHOOSING, MEASURING
"""The parts of a conversion that count tokens in place of bytes."""


def no_bars(_: str, __: int) -> AbstractContextManager[Callable[[int], object]]:
    """Show nothing."""
    return nullcontext(lambda _: None)
