"""Work that is spread: results in order, none twice or missing, whatever becomes of the workers."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from rwkv_cli.engine import spread as module
from rwkv_cli.engine.spread import Ended, Failure, Step, spread
from rwkv_cli.errors import WorkerError


class Pretended:
    """A crew that ends parts in any order, loses workers and gets new ones."""

    def __init__(self, seed: int, size: int, loss: float = 0.0, deadly: frozenset[int] = frozenset()) -> None:
        self.random, self.loss, self.deadly = random.Random(seed), loss, deadly
        self.coming, self.free = size, 0
        self.odd = -1
        self.working: dict[range, Sequence[int]] = {}
        self.finished: Counter[int] = Counter()
        self.struck: Counter[range] = Counter()
        self.parts: list[range] = []

    @property
    def size(self) -> int:
        return self.coming + self.free + len(self.working)

    def begin(self, part: range, items: Sequence[int]) -> None:
        assert self.free > 0
        assert list(items) == list(part)
        self.free -= 1
        self.working[part] = items
        self.parts.append(part)

    def ended(self) -> list[Ended[int]]:
        came = self.random.randint(0, self.coming)
        self.free, self.coming = self.free + came, self.coming - came
        out: list[Ended[int]] = []
        for part in self.random.sample(list(self.working), self.random.randint(0, len(self.working))):
            items = self.working.pop(part)
            if self.deadly & set(part) or (self.struck[part] < 2 and self.random.random() < self.loss):
                self.struck[part] += 1
                self.coming += 1
                out.append(Ended(part, None))
                continue
            self.free += 1
            self.finished.update(items)
            out.append(Ended(part, [Failure("is odd") if item == self.odd else -item for item in items]))
        return out


def run(count: int, crew: Pretended, most: int = 5, got: list[int] | None = None) -> list[int]:
    """All results, as far as they come."""
    got = [] if got is None else got
    for step in spread(range(count), crew, most, "text {}".format):
        got += step.results
    return got


@pytest.mark.parametrize("loss", [0.0, 0.3])
@pytest.mark.parametrize("workers", [1, 3, 40])
@pytest.mark.parametrize("seed", range(10))
def test_each_result_comes_once_and_in_order(seed: int, workers: int, loss: float) -> None:
    crew = Pretended(seed, workers, loss)
    assert run(70, crew) == [-item for item in range(70)]
    assert set(crew.finished.values()) == {1}


def test_no_items_need_no_workers() -> None:
    assert run(0, Pretended(0, 0)) == []


def test_parts_get_smaller_towards_the_end() -> None:
    crew = Pretended(1, 4)
    run(400, crew, 32)
    sizes = [len(part) for part in crew.parts]
    assert sizes[0] == 32
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-4:] == [1] * 4


def test_few_items_go_to_many_workers() -> None:
    crew = Pretended(1, 4)
    run(4, crew, 32)
    assert [len(part) for part in crew.parts] == [1] * 4


def test_no_item_is_begun_far_ahead_of_a_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AHEAD", 20)

    class Slow(Pretended):
        def ended(self) -> list[Ended[int]]:
            first = self.working.pop(range(1), None) if self.patience > 0 else None
            self.patience -= 1
            out = super().ended()
            if first is not None:
                self.working[range(1)] = first
            return out

    crew = Slow(3, 4)
    crew.patience = 100
    steps: list[Step[int]] = list(spread(range(200), crew, 1, str))
    assert max(step.waiting for step in steps) == 19
    assert [result for step in steps for result in step.results] == [-item for item in range(200)]


@pytest.mark.parametrize("seed", range(5))
def test_a_failure_names_its_item_after_all_results_before_it(seed: int) -> None:
    got: list[int] = []
    crew = Pretended(seed, 6, 0.05)
    crew.odd = 77
    with pytest.raises(WorkerError, match=r"^text 77: is odd$"):
        run(200, crew, got=got)
    assert got == [-item for item in range(77)]


@pytest.mark.parametrize("seed", range(5))
def test_an_item_that_workers_do_not_survive_is_named(seed: int) -> None:
    crew = Pretended(seed, 4, deadly=frozenset({33}))
    got: list[int] = []
    with pytest.raises(WorkerError, match=r"^text 33: 3 workers were lost with it"):
        run(60, crew, 8, got)
    assert got == [-item for item in range(33)]
    assert crew.parts.count(range(33, 34)) == 3


def test_lost_workers_are_counted() -> None:
    *_, last = spread(range(300), Pretended(2, 4, 0.2), 3, str)
    assert last.lost > 10
