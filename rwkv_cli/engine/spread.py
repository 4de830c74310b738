"""Work spread over workers that come and go, with the results in the order of the items.

This knows no network. A `Crew` does (`engine/cluster.py`), and the tests have one that only pretends.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from rwkv_cli.errors import WorkerError

Item = TypeVar("Item")
ItemIn = TypeVar("ItemIn", contravariant=True)
Result = TypeVar("Result")
ResultOut = TypeVar("ResultOut", covariant=True)

_AHEAD = 10_000
"""Items that may be begun behind one whose result lacks. This bounds the results that wait for it."""

_TRIES = 3
"""Workers that an item may be lost with, before it is taken for the reason."""


@dataclass(frozen=True)
class Failure:
    """The result of an item that could not be worked on."""

    reason: str


@dataclass(frozen=True)
class Ended(Generic[ResultOut]):
    """A part of the items that is no longer worked on."""

    part: range
    results: Sequence[ResultOut | Failure] | None
    """A result for each item, or None if the worker was lost."""


class Crew(Protocol[ItemIn, ResultOut]):
    """Workers, each of which works on one part of the items at a time."""

    @property
    def size(self) -> int:
        """The number of workers, those that are still getting ready included."""

    @property
    def free(self) -> int:
        """The number of workers that are ready."""

    def begin(self, part: range, items: Sequence[ItemIn]) -> None:
        """Have a free worker work on items, whose numbers are `part`."""

    def ended(self) -> Sequence[Ended[ResultOut]]:
        """Wait a part of a second for parts to end, or for workers to come. Each part ends once."""


@dataclass(frozen=True)
class Step(Generic[ResultOut]):
    """The news after one wait."""

    results: list[ResultOut]
    """The next results, in the order of the items."""
    waiting: int
    """Results that are there and wait for one before them."""
    workers: int
    """Workers there are, those that are still getting ready included."""
    lost: int
    """Workers lost so far."""


def spread(
    items: Sequence[Item], crew: Crew[Item, Result], most: int, name: Callable[[Item], str]
) -> Iterator[Step[Result]]:
    """Have a crew work on items, up to `most` in one part. Yields after each wait; each result comes once.

    Parts become smaller towards the end, so that all workers end together. What a lost worker had is done again, one
    item at a time. Raises WorkerError, which calls the item by its `name`, for a failure and for an item that workers
    do not survive. The results before it were yielded then, as if one worker had done all.
    """
    done: dict[int, Result | Failure] = {}
    again: list[int] = []
    tries: Counter[int] = Counter()
    head = begun = lost = 0
    while head < len(items):
        while crew.free and (again or begun < min(len(items), head + _AHEAD)):
            if again:
                part = range(again[0], heapq.heappop(again) + 1)
            else:
                size = max(1, min(most, (len(items) - begun) // (2 * crew.size)))
                part = range(begun, min(begun + size, len(items)))
                begun = part.stop
            crew.begin(part, items[part.start : part.stop])
        for ended in crew.ended():
            if ended.results is not None:
                done.update(zip(ended.part, ended.results, strict=True))
                continue
            lost += 1
            for number in ended.part:
                tries[number] += len(ended.part) == 1
                if tries[number] == _TRIES:
                    done[number] = Failure(f"{_TRIES} workers were lost with it; is it too large for their memory?")
                else:
                    heapq.heappush(again, number)
        results: list[Result] = []
        failure = None
        while failure is None and head in done:
            result = done.pop(head)
            if isinstance(result, Failure):
                failure = result
            else:
                results.append(result)
                head += 1
        yield Step(results, len(done), crew.size, lost)
        if failure is not None:
            raise WorkerError(f"{name(items[head])}: {failure.reason}")
