"""Passes that read guesses ahead of a text. The text is the same as without them, bit for bit.

A pass reads the token that was chosen last and some guesses at those that follow. Its logits after each row have the
bits that they would have alone, so each token is chosen from the same logits, with its own random number. The first
token that was not guessed ends what the pass is good for; the states between its rows were kept, and the text goes on
from the right one.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.drafting import Drafter
from rwkv_cli.engine.sampling import Sampler
from rwkv_cli.models import Model, State

Logits = NDArray[np.float32]

_GUESSES = (0, 1, 3, 7)
"""The numbers of guesses that a pass may read. Each has a speed of its own, which is measured."""
_SLOWER, _FADING = 1.1, 0.999
"""The most that a pass may take longer than the last one of its kind, since what is more comes from other programs; and
what is left of its time with each other pass, so that it is tried again one day."""
_GAIN = 1.1
"""How many times as fast guesses have to be to be worth it: what is measured is never exact."""
_LAST = 1 / 16
"""The weight of the last guess in the share of guesses that are right."""


class Pace:
    """The time that passes and guesses take, and how many guesses are worth it."""

    def __init__(self) -> None:
        self.passes: dict[int, float] = {}
        """Seconds of a pass, by its number of guesses."""
        self.guess = 0.0
        """Seconds of a guess."""
        self.right = 0.5
        """The share of guesses that were right, of late."""

    def passed(self, guesses: int, seconds: float) -> None:
        """Learn what a pass took."""
        self.passes = {n: old * _FADING for n, old in self.passes.items()}
        alone = self.passes.get(0, seconds)  # a row never takes longer than a pass of its own
        self.passes[guesses] = min(seconds, self.passes.get(guesses, alone * (guesses + 1)) * _SLOWER)

    def guessed(self, guesses: int, seconds: float) -> None:
        """Learn what some guesses took together."""
        each = seconds / guesses
        self.guess = min(each, (self.guess or each) * _SLOWER)

    def came(self, right: bool) -> None:
        """Learn whether a guess was right. Guesses after a wrong one tell nothing."""
        self.right += (right - self.right) * _LAST

    def best(self) -> int:
        """The number of guesses with the most tokens a second. What was never tried is taken to cost nothing."""
        if 0 not in self.passes:
            return 0

        def speed(guesses: int) -> float:
            tokens = sum(self.right**n for n in range(guesses + 1))
            speed = tokens / (self.passes.get(guesses, self.passes[0]) + guesses * self.guess)
            return speed if guesses else speed * _GAIN

        return max(_GUESSES, key=speed)


class Count(NamedTuple):
    """A number of guesses."""

    read: int
    """Those that passes have read."""
    right: int
    """Those of them that the text went on with."""


class _Guess(NamedTuple):
    """A guess at a token, and the logits and the state after it if a pass has read it."""

    token: int
    read: tuple[Logits, State] | None = None


class Speculation:
    """The passes of one text at a time, which read guesses ahead where that makes the text faster."""

    def __init__(self, model: Model, drafter: Drafter) -> None:
        """Raises DeviceError where the model's device cannot keep the states between rows."""
        self.model, self.drafter, self.pace = model, drafter, Pace()
        self._snapshots = model.new_snapshots(_GUESSES[-1] + 1)
        self._guesses: deque[_Guess] = deque()
        """The guesses at what comes after the last call."""
        self._own: State | None = None
        """The state that the last pass has changed."""
        self._at: State | None = None
        """The state that was returned last: `_own`, or a view of a snapshot."""
        self._waited = 0
        self._read = self._right = 0

    def begin(self, ids: Sequence[int]) -> None:
        """Begin with another text, of which these tokens were read."""
        self.drafter.begin(ids)
        self._guesses.clear()
        self._own = self._at = None

    def advance(
        self, ids: Sequence[int], state: State, sampler: Sampler, watch: Callable[[int], object] | None = None
    ) -> tuple[Logits, State]:
        """`Model.advance`, which returns the state too: `state`, or a view that the next call changes.

        `sampler` chooses the token after `ids`, and stays as it is.
        """
        self.drafter.read(ids)
        known = self._known(ids)
        if known is not None:
            return known
        own = self.settled(state)
        rows = self._rows(ids, sampler)
        start = time.perf_counter()
        if len(rows) == len(ids):
            logits, self._at = self.model.advance(ids, own, watch=watch), own
        else:
            logits, self._at = self._read_ahead(rows, own)
        self._own = own
        if len(ids) == 1:
            self.pace.passed(len(rows) - 1, time.perf_counter() - start)
        return logits, self._at

    def settled(self, state: State) -> State:
        """A state as it is, or what a view shows in the text's own memory. Nothing is known of what comes next."""
        self._guesses.clear()
        if self._own is None or state is not self._at or state is self._own:
            return state
        self._own.take(state)
        return self._own

    def count(self) -> Count:
        """Return the number of guesses since the last call."""
        count = Count(self._read, self._right)
        self._read = self._right = 0
        return count

    def _known(self, ids: Sequence[int]) -> tuple[Logits, State] | None:
        """The logits and the state that the last pass has made of the next token, if it has read it."""
        if not self._guesses or len(ids) > 1:
            return None
        guess = self._guesses.popleft()
        right = list(ids) == [guess.token]
        self.pace.came(right)
        if not right or guess.read is None:
            return None
        self._right += 1
        self._at = guess.read[1]
        return guess.read

    def _rows(self, ids: Sequence[int], sampler: Sampler) -> list[int]:
        """The tokens that a pass is to read: `ids`, and guesses where they are worth it."""
        self._waited += 1
        most = self.pace.best()
        if len(ids) > 1 or (most == 0 and self._waited < self.drafter.patience):
            return list(ids)
        self._waited = 0
        start = time.perf_counter()
        tokens = self.drafter.guess(max(most, 1), sampler)
        if tokens:
            self.pace.guessed(len(tokens), time.perf_counter() - start)
        read = max(n for n in _GUESSES if n <= min(most, len(tokens)))
        # one that no pass reads tells all the same whether it would have been right
        self._guesses.extend(map(_Guess, tokens[:1] if read == 0 else ()))
        return [*ids, *tokens[:read]]

    def _read_ahead(self, rows: Sequence[int], own: State) -> tuple[Logits, State]:
        """Read a token and the guesses behind it. Returns the logits and the state after the token."""
        logits = self.model.read_ahead(rows, own, self._snapshots)
        states = [*map(self._snapshots.after, range(len(rows) - 1)), own]
        reads = zip(logits[1:], states[1:], strict=True)
        self._guesses.extend(map(_Guess, rows[1:], reads))
        self._read += len(rows) - 1
        return logits[0], states[0]
