"""The way from logits to a token, in the order of the reference (rwkv package, utils.py, `sample_logits`).

Penalties come off the logits. Softmax, top-p, top-k and min-p follow, at temperature 1. The temperature comes last, as
a power of the probabilities that are left.
"""

from collections import defaultdict
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

    def changed(self, **given: Any) -> "Sampling":
        """These settings with those of `given` that are not None in their place."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


@dataclass
class Sampler:
    """The choice of tokens, with a memory of those chosen. The same settings and seed give the same choices."""

    settings: Sampling
    seed: int
    exempt: frozenset[int] = frozenset()
    """Tokens whose occurrences are not counted. They cost the presence penalty only."""
    _counts: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float), init=False)

    def __post_init__(self) -> None:
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Choose the next token from logits [V]."""
        s = self.settings
        scores = logits.astype(np.float64)
        if self._counts:
            ids = np.fromiter(self._counts, np.int64)
            counts = np.fromiter(self._counts.values(), np.float64)
            scores[ids] -= s.presence_penalty + s.frequency_penalty * counts
        if s.temperature == 0 or s.top_k == 1:
            token = int(np.argmax(scores))
        else:
            kept, p = candidates(scores, s)
            upto = np.cumsum(p)
            # Rounding may leave upto[-1] short of 1. A number below it never meets a token of probability 0.
            token = int(kept[np.searchsorted(upto, self._random.random() * upto[-1], side="right")])
        self._remember(token)
        return token

    def _remember(self, token: int) -> None:
        """Count a chosen token, and let older ones fade."""
        if not (self.settings.presence_penalty or self.settings.frequency_penalty):
            return
        for other in self._counts:
            self._counts[other] *= self.settings.penalty_decay
        self._counts[token] += 0 if token in self.exempt else 1

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
        return dict(self._counts)

    @counts.setter
    def counts(self, counts: dict[int, float]) -> None:
        self._counts = defaultdict(float, counts)

    def forget(self) -> None:
        """Penalize nothing that was chosen before. The random numbers go on."""
        self._counts.clear()


def candidates(logits: NDArray[np.float64], s: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that may be chosen, likeliest first, and their probabilities. The temperature is not 0."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    # A few likely tokens nearly always hold all that is kept. They sort much faster than a whole vocabulary.
    some = np.flatnonzero(p >= p.max() / 1000)
    order = some[np.argsort(-p[some], kind="stable")]
    reached = s.top_p < 1 and p[order].cumsum()[-1] >= s.top_p
    if not (reached or 0 < s.top_k <= len(order) or s.min_p >= 1 / 1000):
        order = np.argsort(-p, kind="stable")
    p = p[order]
    count = len(p)
    if s.top_p < 1:
        # The first token that reaches top_p is kept, and so are all tokens as likely.
        last = min(int(np.searchsorted(np.cumsum(p), s.top_p)), count - 1)
        count = int(np.searchsorted(-p, -p[last], side="right"))
    if s.top_k > 0:
        count = min(count, s.top_k)
    if s.min_p > 0:
        count = min(count, max(1, int(np.searchsorted(-p, -s.min_p * p[0], side="right"))))
    p = (p[:count] / p[0]) ** (1 / s.temperature)
    return order[:count], p / p.sum()
