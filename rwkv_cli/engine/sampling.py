"""The way from logits to a token, in the order of the reference (rwkv package, utils.py, `sample_logits`).

Penalties come off the logits. Softmax, top-p, top-k and min-p follow, at temperature 1. The temperature comes last, as
a power of the probabilities that are left.
"""

import copy
import math
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """Settings of the choice. The defaults are the reference's (PIPELINE_ARGS)."""

    temperature: float = 1.0
    top_p: float = 0.85
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.2
    frequency_penalty: float = 0.2
    penalty_decay: float = 0.996

    def check(self) -> None:
        """Raise ValueError for a setting that no answer can be made with."""
        shares = self.top_p, self.min_p, self.penalty_decay
        penalties = self.presence_penalty, self.frequency_penalty
        numbers = (self.temperature, *shares, *penalties)
        if type(self.top_k) is not int or any(type(number) not in (int, float) for number in numbers):
            raise ValueError("a setting is no number of its kind")
        # a comparison with NaN is False
        if not (0 <= self.temperature < math.inf and self.top_k >= 0 and all(0 <= share <= 1 for share in shares)):
            raise ValueError("a setting is out of its range")
        if not all(-100 <= penalty <= 100 for penalty in penalties):
            raise ValueError("a penalty is out of its range")

    def changed(self, **given: Any) -> "Sampling":
        """These settings with those of `given` that are not None in their place."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


_FADED = 1e-200
"""A count below this no longer changes any logit."""


@dataclass
class Sampler:
    """The choice of tokens, with a memory of those chosen. The same settings and seed give the same choices."""

    settings: Sampling
    seed: int
    exempt: frozenset[int] = frozenset()
    """Tokens whose occurrences are not counted. They cost the presence penalty only."""
    _counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), init=False, repr=False)
    """Decayed number of times that each token was chosen, [V], or empty as long as nothing is counted."""
    _seen: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), init=False, repr=False)
    """1 for each token that was chosen and 0 for the others, as long as `_counts`."""
    _steps: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Choose the next token from logits [V]."""
        s = self.settings
        scores, penalties, others = _ROOM.arrays(len(logits))
        scores[:] = logits
        if self._seen.size:
            self._make_room(len(scores))
            np.multiply(self._seen, s.presence_penalty, out=penalties)
            penalties += np.multiply(self._counts, s.frequency_penalty, out=others)
            scores -= penalties
        if s.temperature == 0 or s.top_k == 1:
            token = int(np.argmax(scores))
        else:
            kept, p = candidates(scores, s)
            upto = np.cumsum(p)
            # Rounding may leave upto[-1] short of 1. A number below it never meets a token of probability 0.
            token = int(kept[np.searchsorted(upto, self._random.random() * upto[-1], side="right")])
        self._count(token, len(scores))
        return token

    def _count(self, token: int, vocab: int) -> None:
        """Remember a token of a vocabulary, where there are penalties."""
        if self.settings.presence_penalty or self.settings.frequency_penalty:
            self._make_room(vocab)
            self._remember(token)

    def copy(self) -> "Sampler":
        """Return a sampler that will choose the same, whatever becomes of this one."""
        return copy.deepcopy(self)

    def ahead(self) -> list[int]:
        """Tokens that follow for certain, whatever the logits are. Here there are none."""
        return []

    def _make_room(self, vocab: int) -> None:
        """Give every token of the vocabulary a count. All of them cost the same with each token, early and late."""
        if len(self._seen) < vocab:
            more = np.zeros(vocab - len(self._seen))
            self._counts, self._seen = np.concatenate([self._counts, more]), np.concatenate([self._seen, more])

    def _remember(self, token: int) -> None:
        """Count a chosen token, and let older ones fade."""
        self._counts *= self.settings.penalty_decay
        self._steps += 1
        if self._steps % 64 == 0:
            # Counts would fade into numbers that CPUs multiply a hundred times more slowly, and would stay there.
            self._counts[self._counts < _FADED] = 0
        self._counts[token] += 0 if token in self.exempt else 1
        self._seen[token] = 1

    @property
    def random(self) -> dict[str, Any]:
        """Position in the random numbers. Set it to go on from there."""
        return dict(self._random.bit_generator.state)

    @random.setter
    def random(self, state: dict[str, Any]) -> None:
        self._random.bit_generator.state = state

    @property
    def counts(self) -> dict[int, float]:
        """Decayed number of times that each token was chosen. Penalties follow from it; set it to go on from there."""
        return {int(token): float(self._counts[token]) for token in np.flatnonzero(self._seen)}

    @counts.setter
    def counts(self, counts: dict[int, float]) -> None:
        self.forget()
        self._make_room(max(counts, default=-1) + 1)
        for token, count in counts.items():
            self._counts[token], self._seen[token] = count, 1

    def forget(self) -> None:
        """Penalize nothing that was chosen before. The random numbers go on."""
        self._counts, self._seen = np.zeros(0), np.zeros(0)


class _Room(threading.local):
    """Arrays of a thread's own for a whole vocabulary. New ones would cost more than what is done in them."""

    def __init__(self) -> None:
        self._arrays = np.empty((3, 0))

    def arrays(self, vocab: int) -> NDArray[np.float64]:
        """Three arrays [V] with any values, good until this thread asks again."""
        if vocab > self._arrays.shape[1]:
            self._arrays = np.empty((3, vocab))
        return self._arrays[:, :vocab]


_ROOM = _Room()
_ROUNDING = 1e-9
"""More than the rounding of a sum of probabilities."""


def candidates(logits: NDArray[np.float64], s: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that may be chosen, likeliest first, and their probabilities. The temperature is not 0."""
    _, p, _ = _ROOM.arrays(len(logits))
    np.subtract(logits, logits.max(), out=p)
    np.exp(p, out=p)
    p /= p.sum()
    # A few likely tokens nearly always hold all that is kept. They sort much faster than a whole vocabulary.
    some = np.flatnonzero(p >= p.max() / 1000)
    enough = 0 < s.top_k <= len(some) or s.min_p >= 1 / 1000 or p[some].sum() >= s.top_p + _ROUNDING
    order = some[_falling(p[some])] if enough and 2 * len(some) < len(p) else _falling(p)
    sorted_p = p[order]
    upto = np.cumsum(sorted_p)
    count = len(order)
    if s.top_p < 1:
        # The first token that reaches top_p is kept, and so are all tokens as likely.
        last = min(int(np.searchsorted(upto, s.top_p)), count - 1)
        count = int(np.searchsorted(-sorted_p, -sorted_p[last], side="right"))
    if s.top_k > 0:
        count = min(count, s.top_k)
    if s.min_p > 0:
        count = min(count, max(1, int(np.searchsorted(-sorted_p, -s.min_p * sorted_p[0], side="right"))))
    p = (sorted_p[:count] / sorted_p[0]) ** (1 / s.temperature)
    return order[:count], p / p.sum()


def _falling(p: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the order in which p falls, equal ones as they come: np.argsort(-p, kind="stable").

    Numbers that are not negative are in the order of their bits. NumPy sorts 16 bits by counting, which takes a third
    of the time for a whole vocabulary.
    """
    bits = ~p.view(np.uint64)
    order = np.argsort(bits.astype(np.uint16), kind="stable")
    for shift in (16, 32, 48):
        digits = (bits >> np.uint64(shift)).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order
