"""The figures of models on tasks: means over items with standard errors, and paired differences."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rwkv_cli.engine.significance import Paired, mean_of, paired
from rwkv_cli.engine.tasks import Answer, Task


@dataclass(frozen=True)
class Measure:
    """One figure of a model, with the other model's if two are compared."""

    name: str
    value: float
    stderr: float
    against: Paired | None

    def as_json(self) -> dict[str, float | None]:
        """Return the figures. NaN is null, as JSON lacks it."""
        facts = {"value": self.value, "stderr": self.stderr}
        if self.against is not None:
            a = self.against
            facts |= {"other": a.other, "difference": a.difference, "difference_stderr": a.stderr, "p": a.p}
        return {key: None if math.isnan(value) else value for key, value in facts.items()}


@dataclass
class Part:
    """The answers to one part of a task so far."""

    task: str
    name: str
    of: int
    """The number of items that the part has."""
    answers: list[Answer] = field(default_factory=list)

    def measures(self) -> Iterator[Measure]:
        """Yield the figures of the part's answers."""
        for name in self.answers[0].figures[0] if self.answers else ():
            ours, *others = ([answer.figures[m][name] for answer in self.answers] for m in range(self._models()))
            mean = mean_of(ours)
            yield Measure(name, mean.mean, mean.stderr, paired(ours, others[0]) if others else None)

    def _models(self) -> int:
        return len(self.answers[0].figures)

    def as_json(self) -> dict[str, Any]:
        """Return every figure."""
        measures = {measure.name: measure.as_json() for measure in self.measures()}
        return {"task": self.task, "part": self.name, "items": len(self.answers), "of": self.of, "measures": measures}


class Tally:
    """The answers to a task so far."""

    def __init__(self, task: Task) -> None:
        self._parts = {name: Part(task.name, name, of) for name, of in task.parts.items()}

    def add(self, answers: Sequence[Answer]) -> None:
        """Count answers."""
        for answer in answers:
            self._parts[answer.part].answers.append(answer)

    @property
    def parts(self) -> Sequence[Part]:
        """The parts in order."""
        return list(self._parts.values())
