"""Tasks that show what a model can do: they are made of texts, so that models with any vocabulary take the same."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rwkv_cli.engine.batch import complete_together
from rwkv_cli.engine.completion import Completion, Request, Result
from rwkv_cli.engine.json_lines import json_lines
from rwkv_cli.engine.likelihood import BATCH, Likelihood, Question, answer_questions, start_of_text
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.errors import TaskError, TokenizerError

FORM = "Question: {question}\nAnswer:"
"""How a question is written, if nothing else is said."""

_LIKELIEST = Sampling(temperature=0, presence_penalty=0, frequency_penalty=0)

Figures = Mapping[str, float]
"""The results of a model on one item, by the measure's name. Those called "accuracy…" are 0 or 1."""


@dataclass(frozen=True)
class Answer:
    """The results of each model on one item."""

    part: str
    figures: tuple[Figures, ...]


@dataclass(frozen=True)
class Step:
    """The outcome of a part of a task's work."""

    answers: Sequence[Answer]
    tokens: int
    """Tokens that models have read, or made, with this step."""
    share: float
    """The share of the task that is done by now."""


class Task(Protocol):
    """The interface of every task."""

    @property
    def name(self) -> str:
        """The name in tables."""

    @property
    def parts(self) -> Mapping[str, int]:
        """The number of items of each part. Each part has figures of its own."""

    def run(self, models: Sequence[LanguageModel]) -> Iterator[Step]:
        """Give every item to every model. The work of a step is done when it is yielded."""


@dataclass(frozen=True)
class Item:
    """A context and texts that may follow it, of which `right` is the number of the right one."""

    where: str
    """The name of the item in messages."""
    context: str
    endings: tuple[str, ...]
    right: int = 0


@dataclass(frozen=True)
class Choosing:
    """A task of likelihoods: of the last word of each text, or of each of several answers."""

    name: str
    items: Sequence[Item]

    @property
    def parts(self) -> Mapping[str, int]:
        return {"": len(self.items)}

    def run(self, models: Sequence[LanguageModel]) -> Iterator[Step]:
        asked = [[_question(model, item) for item in self.items] for model in models]
        runs = [answer_questions(model, questions) for model, questions in zip(models, asked, strict=True)]
        done = 0
        for found in zip(*runs, strict=True):
            batch = slice(done, done + len(found[0]))
            done = batch.stop
            answers = [
                Answer("", tuple(_figures(item, of_model) for of_model in of_models))
                for item, *of_models in zip(self.items[batch], *found, strict=True)
            ]
            read = [question for questions in asked for question in questions[batch]]
            tokens = sum(len(question.context) + sum(map(len, question.endings)) for question in read)
            yield Step(answers, tokens, done / len(self.items))


def encoded(model: LanguageModel, where: str, text: str) -> list[int]:
    """Return the ids of a text of the item `where`. Raises TaskError for one that the model cannot read."""
    try:
        return model.text_tokenizer.encode(text)
    except TokenizerError as error:
        raise TaskError(f"{where}: {model.path} cannot read it: {error}") from None


def _question(model: LanguageModel, item: Item) -> Question:
    """Return an item as ids. The context and each ending are encoded by themselves, as the reference does."""
    endings = [encoded(model, item.where, ending) for ending in item.endings]
    if not all(endings):
        raise TaskError(f"{item.where}: an answer has no tokens")
    return Question([start_of_text(model), *encoded(model, item.where, item.context)], endings)


def _figures(item: Item, likelihoods: Sequence[Likelihood]) -> Figures:
    """Judge the likelihoods of an item's endings."""
    if len(likelihoods) == 1:
        return {"accuracy": float(likelihoods[0].greedy), "nll_word": likelihoods[0].nll}
    by_sum = min(range(len(likelihoods)), key=lambda i: likelihoods[i].nll)
    by_mean = min(range(len(likelihoods)), key=lambda i: likelihoods[i].nll / likelihoods[i].tokens)
    return {"accuracy_sum": float(by_sum == item.right), "accuracy_mean": float(by_mean == item.right)}


@dataclass(frozen=True)
class Exercise:
    """A text to go on from, and the answers that are right."""

    where: str
    part: str
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Writing:
    """A task of answers that the model writes, the likeliest token at a time, up to the end of a line."""

    name: str
    exercises: Sequence[Exercise]

    @property
    def parts(self) -> Mapping[str, int]:
        counts: dict[str, int] = {}
        for exercise in self.exercises:
            counts[exercise.part] = counts.get(exercise.part, 0) + 1
        return counts

    def run(self, models: Sequence[LanguageModel]) -> Iterator[Step]:
        asked = [[encoded(model, each.where, each.prompt) for each in self.exercises] for model in models]
        for at in range(0, len(self.exercises), BATCH):
            some = self.exercises[at : at + BATCH]
            made = [
                _written(model, some, prompts[at : at + BATCH]) for model, prompts in zip(models, asked, strict=True)
            ]
            answers = [
                Answer(each.part, tuple({"accuracy": float(text.strip() in each.answers)} for text in texts))
                for each, *texts in zip(some, *([result.text for result in results] for results in made), strict=True)
            ]
            tokens = sum(result.prompt_tokens + result.tokens for results in made for result in results)
            yield Step(answers, tokens, (at + len(some)) / len(self.exercises))


def _written(model: LanguageModel, exercises: Sequence[Exercise], prompts: Sequence[Sequence[int]]) -> list[Result]:
    """Return the results of a model on some exercises, whose answers are written together."""
    completions = []
    for exercise, ids in zip(exercises, prompts, strict=True):
        # every token has a byte, so that no right answer is longer
        most = max(len(answer.encode()) for answer in exercise.answers) + 8
        request = Request([start_of_text(model), *ids], most, ("\n",))
        completions.append(Completion(model, model.new_state(), Sampler(_LIKELIEST, 0), request))
    for _ in complete_together(model, completions, BATCH):
        pass
    return [completion.result for completion in completions]


def read_task(name: str, data: bytes, form: str = FORM, limit: int | None = None) -> Task:
    """Read a task from a file's bytes, whose keys tell its kind. Raises TaskError, which names the line.

    The kinds are LAMBADA (`text`), multiple choice (`question`, `choices`, `answer`) and exact answers (`question`,
    `answer`). `form` says how a question is written. Up to `limit` items are taken.
    """
    items: list[Item] = []
    exercises: list[Exercise] = []
    for number, value in itertools.islice(json_lines(name, data, TaskError), limit):
        where = f"{name} line {number}"
        try:
            made = _read_item(where, value, form)
        except ValueError as error:
            raise TaskError(f"{where}: {error}") from None
        mixed: Sequence[object] = items if isinstance(made, Exercise) else exercises
        if mixed or (isinstance(made, Item) and items and (len(items[0].endings) == 1) != (len(made.endings) == 1)):
            raise TaskError(f"{where}: is an item of another kind than the lines before")
        if isinstance(made, Item):
            items.append(made)
        else:
            exercises.append(made)
    if not items and not exercises:
        raise TaskError(f"{name}: holds no items")
    return Choosing(name, items) if items else Writing(name, exercises)


def _read_item(where: str, value: Any, form: str) -> Item | Exercise:
    """Read one line. Raises ValueError, which says what is wrong."""
    if not isinstance(value, dict) or not ("text" in value or {"question", "answer"} <= value.keys()):
        raise ValueError(
            'not an item of a task: it needs "text" (LAMBADA), or "question" and "answer", with or without "choices"'
        )
    if "text" in value:
        text = value["text"]
        if not isinstance(text, str) or " " not in text:
            raise ValueError('its "text" must be a text of two words or more')
        context, _, word = text.rpartition(" ")
        return Item(where, context, (f" {word}",))
    question, answer = value["question"], value["answer"]
    if not isinstance(question, str) or not question:
        raise ValueError('its "question" must be a text that is not empty')
    prompt = form.replace("{question}", question)
    if "choices" not in value:
        return Exercise(where, "", prompt, _texts([answer] if isinstance(answer, str) else answer, "answer", 1))
    choices = _texts(value["choices"], "choices", 2)
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError('its "answer" must be one of its "choices", or the number of one from 0')
    blank = "" if prompt[-1:].isspace() else " "
    return Item(where, prompt, tuple(blank + choice for choice in choices), answer)


def _texts(value: Any, key: str, least: int) -> tuple[str, ...]:
    """Check a list of texts."""
    if not isinstance(value, list) or len(value) < least or not all(isinstance(x, str) and x.strip() for x in value):
        many = "a text or a list of texts" if least == 1 else f"a list of {least} texts or more"
        raise ValueError(f'its "{key}" must be {many}, none of them empty')
    return tuple(x.strip() for x in value)
