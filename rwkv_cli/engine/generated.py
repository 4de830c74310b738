"""Tasks that the program makes itself from a seed: arithmetic, and recall over a distance."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rwkv_cli.engine.likelihood import likelihoods, start_of_text
from rwkv_cli.engine.model import LanguageModel, obey
from rwkv_cli.engine.tasks import Answer, Exercise, Step, Writing, encoded
from rwkv_cli.models import State

_SHOTS = 4
"""Solved sums before each one that is asked."""


def arithmetic(digits: int, items: int, seed: int) -> Writing:
    """Make sums and differences of two numbers of 1 to `digits` digits each, `items` of each length.

    Each prompt has four solved ones of its length before it, none of which is asked. A difference is not negative.
    """
    exercises = []
    for length in range(1, digits + 1):
        rng = np.random.default_rng([seed, length])
        shown = [_sum(rng, length) for _ in range(_SHOTS)]
        before = "".join(f"{asked}{answer}\n" for asked, answer in shown)
        part = f"{length} digit{'' if length == 1 else 's'}"
        for _ in range(items):
            asked, answer = _sum(rng, length)
            while (asked, answer) in shown:
                asked, answer = _sum(rng, length)
            exercises.append(Exercise("arithmetic", part, before + asked, (answer,)))
    return Writing("arithmetic", exercises)


def _sum(rng: np.random.Generator, digits: int) -> tuple[str, str]:
    """Make a sum or a difference: what is asked, and the answer."""
    a, b = (int("".join(map(str, [rng.integers(digits > 1, 10), *rng.integers(0, 10, digits - 1)]))) for _ in "ab")
    if rng.integers(2):
        return f"{a}+{b}=", str(a + b)
    return f"{max(a, b)}-{min(a, b)}=", str(abs(a - b))


_NEAREST = 1024
"""Tokens of the nearest distance of recall."""
_BLOCK = 256
"""Tokens of each text that are read at once."""
NEVER = "never told"
"""The part of recall whose texts lack what is asked for. It says what guessing reaches."""

_NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Fred",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
    "Mary",
    "Sam",
]
_SECRETS = [
    "apple",
    "ball",
    "bird",
    "boat",
    "book",
    "cake",
    "cat",
    "dog",
    "fish",
    "flower",
    "hat",
    "house",
    "star",
    "tree",
]
_VERBS = ["sees", "likes", "finds", "paints", "draws", "wants", "carries", "watches", "keeps", "forgets"]
_KINDS = ["big", "small", "red", "blue", "old", "new", "green", "white", "soft", "round"]
_THINGS = ["box", "stone", "river", "road", "bridge", "door", "window", "garden", "kite", "drum", "cup", "bell", "lamp"]


@dataclass(frozen=True)
class Recall:
    """A secret word is told, a text of so many tokens follows, and the word is asked for.

    Each text is read once: it is asked for at every distance on the way, from a copy of the state. Distances count
    the first model's tokens, up to the end of a sentence.
    """

    distance: int
    """The longest one."""
    items: int
    seed: int
    name = "recall"

    @property
    def distances(self) -> Sequence[int]:
        """All distances, each twice the one before, and the longest one."""
        doubled = [d for k in range(64) if (d := _NEAREST << k) < self.distance]
        return [*doubled, self.distance]

    @property
    def parts(self) -> Mapping[str, int]:
        return dict.fromkeys([NEVER, *map(_tokens, self.distances)], self.items)

    def run(self, models: Sequence[LanguageModel]) -> Iterator[Step]:
        nearest = self.distances[0]
        total = nearest + self.distance
        for told, distances in ((False, [nearest]), (True, self.distances)):
            texts = [_Text(self.seed, number, told) for number in range(self.items)]
            readers = [_Reader(model, [text.beginning for text in texts]) for model in models]
            before, at = nearest if told else 0, 0
            for distance in distances:
                while at < distance:
                    at = min(distance, at + _BLOCK)
                    more = [text.go_on(models[0], at) for text in texts]
                    yield Step([], sum(reader.read(more) for reader in readers), (before + at) / total)
                asked = [reader.ask([text.question for text in texts], [text.secret for text in texts])
                         for reader in readers]  # fmt: skip
                part = _tokens(distance) if told else NEVER
                answers = [Answer(part, figures) for figures in zip(*asked, strict=True)]
                yield Step(answers, 0, (before + at) / total)


def _tokens(distance: int) -> str:
    """Return the name of a distance."""
    return f"{distance} tokens"


class _Text:
    """One text that grows, and its secret."""

    def __init__(self, seed: int, number: int, told: bool) -> None:
        self._rng = np.random.default_rng([seed, number])
        self.name, self.secret = self._one(_NAMES), " " + self._one(_SECRETS)
        says = f"The secret word of {self.name} is"
        self.beginning = f"{says}{self.secret}. Remember it.\n" if told else "Here is a long text.\n"
        self.question = f"\nQuestion: What is the secret word of {self.name}?\nAnswer: {says}"
        self.tokens = 0
        """Tokens after the beginning, in the first model's."""

    def _one(self, words: Sequence[str]) -> str:
        return words[int(self._rng.integers(len(words)))]

    def go_on(self, model: LanguageModel, upto: int) -> str:
        """Return one more sentence, or as many as bring the text to `upto` tokens."""
        made = ""
        while not made or self.tokens < upto:
            sentence = f"{self._one(_NAMES)} {self._one(_VERBS)} a {self._one(_KINDS)} {self._one(_THINGS)}. "
            self.tokens += len(encoded(model, "recall", sentence))
            made += sentence
        return made


class _Reader:
    """A model that reads several texts together."""

    def __init__(self, model: LanguageModel, beginnings: Sequence[str]) -> None:
        self.model = model
        self.state = State.stack([model.new_state()] * len(beginnings))
        ids = [[start_of_text(model), *self._ids(text)] for text in beginnings]
        model.advance_batch(ids, self.state, watch=obey)

    def _ids(self, text: str) -> list[int]:
        return encoded(self.model, "recall", text)

    def read(self, texts: Sequence[str]) -> int:
        """Read on, and return how many tokens that were."""
        ids = [self._ids(text) for text in texts]
        self.model.advance_batch(ids, self.state, watch=obey)
        return sum(map(len, ids))

    def ask(self, questions: Sequence[str], answers: Sequence[str]) -> list[dict[str, float]]:
        """Return how well each answer follows its question. The texts stay as they are."""
        copy = self.state.clone()
        logits = self.model.advance_batch([self._ids(question) for question in questions], copy, watch=obey)
        found = likelihoods(self.model, logits, copy, [[self._ids(answer)] for answer in answers])
        return [{"accuracy": float(one.greedy), "nll": one.nll} for (one,) in found]
