"""Guesses at the next tokens of a text. The text never depends on them: where they are right, it comes faster."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.model import LanguageModel, check_finite
from rwkv_cli.engine.sampling import Sampler
from rwkv_cli.errors import DraftError
from rwkv_cli.models import State


class Drafter(Protocol):
    """Whoever guesses the next tokens of a text."""

    patience: int
    """The number of tokens from one guess to the next where guesses are only made to see if they would be right."""

    def begin(self, ids: Sequence[int]) -> None:
        """Forget all, and learn the last of these tokens, with which another text begins."""

    def read(self, ids: Sequence[int]) -> None:
        """Learn the next tokens of the text."""

    def guess(self, most: int, sampler: Sampler) -> list[int]:
        """Guess up to `most` tokens. `sampler` is about to choose the first of them, and stays as it is."""

    def mark(self) -> State | None:
        """Return what `go_back` needs to come back to this place of the text."""

    def go_back(self, mark: State | None) -> None:
        """Forget what was read after a mark. None is the beginning of a text."""


_LENGTHS = (4, 3, 2)
"""Numbers of tokens that have to be the same as before. The longest that are found say how the text goes on."""


_LOOKED_UP = 1 << 14
"""The most tokens at the beginning of a text in which others are looked up."""


class PromptLookup:
    """Guesses that the text goes on as it did where its last tokens stood before."""

    patience = 1

    def __init__(self) -> None:
        self.begin(())

    def begin(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """The place after the last occurrence of some tokens that something has come after."""
        self.read(ids[-_LOOKED_UP:])

    def read(self, ids: Sequence[int]) -> None:
        for token in ids:
            for n in _LENGTHS:
                self._after[tuple(self._ids[-n:])] = len(self._ids)
            self._ids.append(token)

    def guess(self, most: int, sampler: Sampler) -> list[int]:  # noqa: ARG002 - the text alone decides
        for n in _LENGTHS:
            at = self._after.get(tuple(self._ids[-n:]))
            if at is not None and len(self._ids) > n:
                # a text that repeats itself goes on repeating itself
                return [self._ids[at + i % (len(self._ids) - at)] for i in range(most)]
        return []

    def mark(self) -> None:
        """Nothing: what was taken back may be said again."""

    def go_back(self, mark: State | None) -> None:
        """Nothing, for the same reason."""


class DraftModel:
    """Guesses by a smaller model of the same vocabulary.

    It chooses with a copy of the text's own sampler. So it has the same penalties and random numbers, and chooses the
    same tokens where both models expect the same.
    """

    patience = 32

    def __init__(self, model: LanguageModel, of: LanguageModel) -> None:
        """`of` is the model whose text is guessed. Raises DraftError if the vocabularies differ."""
        self.model = model
        ours, theirs = of.text_tokenizer, model.text_tokenizer
        same = model.config.vocab == of.config.vocab and ours.size == theirs.size
        if not (same and all(ours.decode([i]) == theirs.decode([i]) for i in range(ours.size))):
            raise DraftError(f"{model.path}: has another vocabulary than {of.path}; a draft model needs the same")
        self.go_back(None)

    def begin(self, ids: Sequence[int]) -> None:
        """Begin as `Drafter.begin`, with as many tokens as one pass reads."""
        self.go_back(None)
        self.read(ids[-self.model.backend.chunk :])

    def read(self, ids: Sequence[int]) -> None:
        for token in ids:
            if self._guessed and self._guessed[0][0] == token:
                _, self._state = self._guessed.pop(0)
            else:
                self._guessed.clear()
                self._unread.append(token)

    def guess(self, most: int, sampler: Sampler) -> list[int]:
        """Guess as `Drafter.guess`, nothing beyond the text's end.

        A long text is read a part with each call, and nothing is guessed meanwhile.
        """
        logits = self._read_part()
        if logits is None or self._unread:
            return []
        chooser, state, guesses = sampler.copy(), self._state, list[int]()
        while True:
            guesses.append(chooser.sample(logits))
            if len(guesses) == most or guesses[-1] in self.model.ends:
                return guesses
            state = state.clone()
            logits = self._advance(guesses[-1:], state)
            self._guessed.append((guesses[-1], state))

    def _read_part(self) -> NDArray[np.float32] | None:
        """Read the next part of what is not read yet. Returns the logits after it, or None if all is read."""
        part = self._unread[: self.model.backend.chunk]
        del self._unread[: len(part)]
        return self._advance(part, self._state) if part else None

    def _advance(self, ids: Sequence[int], state: State) -> NDArray[np.float32]:
        """Have a state read some ids, and check the logits after them."""
        logits = self.model.advance(ids, state)
        check_finite(self.model, logits)
        return logits

    def mark(self) -> State:
        """Return the state after all that was read."""
        while self._unread:
            self._read_part()
        return self._state.clone()

    def go_back(self, mark: State | None) -> None:
        self._state = self.model.new_state() if mark is None else mark.clone()
        self._unread: list[int] = []
        """The end of the text, as far as the state has not read it."""
        self._guessed: list[tuple[int, State]] = []
        """The last guesses, each with the state that has read it."""
