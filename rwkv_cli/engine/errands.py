"""The work that workers do: answers to the prompts of a batch, and scores of texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from rwkv_cli.engine.answers import answer_line
from rwkv_cli.engine.completion import Completion
from rwkv_cli.engine.handed import Handed
from rwkv_cli.engine.jobs import Shared, Task, answer
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.scoring import Score, Scorer
from rwkv_cli.errors import TokenizerError
from rwkv_cli.models import State

Item = TypeVar("Item")
ItemIn = TypeVar("ItemIn", contravariant=True)
Result = TypeVar("Result")


Do = Callable[[Sequence[Item], Mapping[Handed, Path]], list[Result]]
"""A function that works on items. It takes where the items' files are, and returns a result for each item."""


class Work(Protocol[ItemIn, Result]):
    """The same work for all items. It travels to the workers, so that it holds nothing that cannot."""

    @property
    def files(self) -> Sequence[Handed]:
        """The files that a worker needs before it can begin."""

    def files_of(self, item: ItemIn) -> Sequence[Handed]:
        """The files that an item needs."""

    def open(self, places: Mapping[Handed, Path], device: str, threads: int) -> Do[ItemIn, Result]:
        """Get ready for any number of items. `places` says where the files are, which may vanish afterwards."""


def _loaded(model: Handed, places: Mapping[Handed, Path], device: str, threads: int) -> LanguageModel:
    """Load a model, whose errors call it by the name that it had where the command runs."""
    loaded = LanguageModel.load(places[model], device, threads)
    loaded.path = model.path
    return loaded


class Answered(NamedTuple):
    """The answer to a prompt."""

    line: bytes
    tokens: int


def answered(task: Task, completion: Completion) -> Answered:
    """Return the answer that a completion has made."""
    return Answered(answer_line(task, completion), completion.result.tokens)


@dataclass(frozen=True)
class Answering:
    """The work of a batch: prompts in, lines of the file of answers out."""

    model: Handed
    shared: Shared
    """The beginning and the settings of all prompts. Its state is one of the CPU."""
    size: int
    """Prompts that go through the model together."""

    @property
    def files(self) -> tuple[Handed, ...]:
        """The model."""
        return (self.model,)

    def files_of(self, item: Task) -> tuple[Handed, ...]:  # noqa: ARG002 - a prompt needs none
        """No files: a task has its prompt."""
        return ()

    def open(self, places: Mapping[Handed, Path], device: str, threads: int) -> Do[Task, Answered]:
        """Load the model."""
        model = _loaded(self.model, places, device, threads)
        model.prepare("last")
        start = self.shared.start
        arrays = map(model.backend.device_array, start.arrays().values())
        shared = replace(self.shared, start=State(start.version, *arrays, digest=start.digest))

        def do(tasks: Sequence[Task], _: Mapping[Handed, Path]) -> list[Answered]:
            made = {}
            for step in answer(model, list(tasks), shared, self.size):
                for task, completion in step.ended:
                    made[task.job.id] = answered(task, completion)
            return [made[task.job.id] for task in tasks]

        return do


class Scored(NamedTuple):
    """The score of a text, with what a reader of it may want to know of the text (see `Scorer`)."""

    score: Score
    carriage_returns: bool
    zeros: bool


@dataclass(frozen=True)
class Scoring:
    """The work of `rwkv ppl`: texts in, scores out."""

    models: tuple[Handed, ...]
    """The model, and the one that it is compared with, if there is one."""
    context: int | None
    start_token: int | None
    limit: int | None

    @property
    def files(self) -> tuple[Handed, ...]:
        """The models."""
        return self.models

    def files_of(self, item: Handed) -> tuple[Handed, ...]:
        """The text itself."""
        return (item,)

    def open(self, places: Mapping[Handed, Path], device: str, threads: int) -> Do[Handed, Scored]:
        """Load the models."""
        models = [_loaded(model, places, device, threads) for model in self.models]
        for model in models:
            model.prepare("losses" if len(models) == 1 else "every")

        def do(texts: Sequence[Handed], places: Mapping[Handed, Path]) -> list[Scored]:
            return [self._score(models, places[text]) for text in texts]

        return do

    def scorer(self, models: Sequence[LanguageModel]) -> Scorer:
        """Return what scores one text with the models."""
        return Scorer(*models, context=self.context, start_token=self.start_token, limit=self.limit)

    def _score(self, models: list[LanguageModel], path: Path) -> Scored:
        scorer = self.scorer(models)
        try:
            score = scorer.score(path, lambda *_: None)
        except TokenizerError as error:  # whoever spreads the work names the text as the user did
            raise TokenizerError(str(error).removeprefix(f"{path}: ")) from None
        return Scored(score, scorer.carriage_returns, scorer.zeros)
