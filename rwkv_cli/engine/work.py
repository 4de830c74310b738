"""The work that a scheduler does for others: answers in the making, and vectors of texts."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.choosing import Chooser, Score, scored
from rwkv_cli.engine.completion import Completion, Request, Steps
from rwkv_cli.engine.model import LanguageModel, check_finite
from rwkv_cli.engine.prefixes import ModelPrefixes
from rwkv_cli.models import State
from rwkv_cli.models.base import chunks

_ALONE = 64
"""Tokens that are read together where nothing else may go on meanwhile."""

_BACK = 16
"""Tokens before the end of a prompt, and between two places in an answer, where a state is kept, too.

The next prompt may split the last of them in another way, or end with another label.
"""

OnChange = Callable[[], object]
"""A function that is called in the scheduler's thread when there is something new, and once at the end."""


class Work(Protocol):
    """Something to be done with a model. It is read from anywhere and changed by the scheduler's thread only."""

    model: LanguageModel
    cancelled: bool
    done: bool
    cached: int
    """Number of tokens that were known and not read."""
    error: Exception | None
    """The error that has ended it, if one has."""
    on_change: OnChange

    def begin(self, prefixes: ModelPrefixes | None) -> bool:
        """Get ready. Returns False while it has to wait for other work."""

    def alone(self) -> Iterator[None]:
        """Do what needs passes of its own, a part at a time."""

    def goes_on(self) -> Completion | None:
        """Return what is left for a batch to do."""


class Answer(Completion):
    """A text in the making for somebody else."""

    sampler: Chooser

    def __init__(
        self,
        model: LanguageModel,
        sampler: Chooser,
        request: Request,
        on_change: OnChange,
        after: "Answer | None" = None,
    ) -> None:
        """`after` has the same prompt. This answer waits until that prompt is read, and then reads none of it."""
        super().__init__(model, model.new_state() if after is None else after.state, sampler, request)
        self.on_change, self._after = on_change, after
        self.done = False
        self.error: Exception | None = None
        self.cached = 0
        self.prompt_scores: list[Score] | None = None
        """The scores of the prompt's tokens but the first, where they are wanted: set it to a list that is empty."""
        self.top = 0
        """How many of the likeliest tokens to keep with each of the prompt's scores."""
        self._prefixes: ModelPrefixes | None = None
        self._logits: NDArray[np.float32] | None = None
        """The logits after the prompt, where they were known."""
        self._cuts: list[int] = []
        self._places: deque[tuple[int, State]] = deque(maxlen=2)
        """The last places in the answer, as numbers of its tokens, and the states there."""

    @property
    def begun(self) -> bool:
        """True once the prompt is read."""
        return self.done or bool(self.result.tokens)

    def begin(self, prefixes: ModelPrefixes | None) -> bool:
        """Find the state to read on from. Returns False while this answer waits for another one's prompt."""
        if self._after is not None and not self._after.begun:
            return False
        self._after = None
        self.state, prompt = self.model.new_state(), self.request.prompt
        if self.prompt_scores is not None or prefixes is None:
            return True
        self._prefixes = prefixes
        whole = prefixes.whole(prompt)
        if whole is None:
            self.state, self.cached = prefixes.find(prompt)
            end = len(prompt)
            cuts = {prefixes.shared(prompt), end - _BACK if end - self.cached > 4 * _BACK else end}
            self._cuts = sorted(cut for cut in cuts if self.cached < cut < end)
        else:
            self.state, self._logits = whole
            self.cached = len(prompt)
        self.result.prompt_tokens = self.cached
        return True

    def alone(self) -> Iterator[None]:
        """Read the prompt but for its last token, where scores are wanted for each."""
        if self.prompt_scores is None:
            return
        prompt = self.request.prompt
        for part in chunks(len(prompt) - 1, _ALONE):
            logits = self.model.advance(prompt[part], self.state, all_logits=True)
            check_finite(self.model, logits)
            self.prompt_scores += scored(logits, prompt[part.start + 1 : part.stop + 1], self.top)
            self.result.prompt_tokens = part.stop
            yield

    def goes_on(self) -> Completion | None:
        """Return this answer, unless no token of it is wanted."""
        return self if self.request.max_tokens else None

    def steps(self, on_read: Callable[[int], object] | None = None) -> Steps:
        """Make the text for a caller that advances the state. States are kept on the way."""
        try:
            prompt, logits = self.request.prompt, self._logits
            for cut in [*self._cuts, len(prompt)] if logits is None else ():
                logits = yield from self._read_prompt(cut, on_read)
                if logits is None:
                    return
                self._keep(self.state, prompt[:cut], logits if cut == len(prompt) else None)
            assert logits is not None, "the prompt has an end"
            yield from self._watched(self._write(logits))
            for count, state in [*self._places, (self.result.read, self.state)]:
                if 0 < count <= self.result.read:
                    self._keep(state, self._read(count))
        except Exception as error:  # whatever went wrong, the others in the batch go on
            self.error = error

    def _watched(self, steps: Steps) -> Steps:
        """Pass steps on, and remember the state at a place every few tokens."""
        ids, at = next(steps, None), 0
        while ids is not None:
            logits = yield ids
            if self._prefixes is not None and len(self.result.ids) >= at + _BACK:
                at = len(self.result.ids)
                self._places.append((at, self.state.clone()))
            try:
                ids = steps.send(logits)
            except StopIteration:
                return

    def _read(self, count: int) -> list[int]:
        """Return the prompt and so many tokens of the answer."""
        return [*self.request.prompt, *self.result.ids[:count]]

    def _keep(self, state: State, ids: Sequence[int], logits: NDArray[np.float32] | None = None) -> None:
        """Keep a state for others."""
        if self._prefixes is not None:
            self._prefixes.keep(ids, state, logits)


class Vector:
    """The vector of a text: the mean of what the model's head would read after each of its tokens, of length 1."""

    def __init__(self, model: LanguageModel, ids: Sequence[int], on_change: OnChange) -> None:
        self.model, self.ids, self.on_change = model, ids, on_change
        self.cancelled = self.done = False
        self.cached = 0
        self.error: Exception | None = None
        self.values: NDArray[np.float64] = np.zeros(model.config.width)

    def begin(self, _prefixes: ModelPrefixes | None) -> bool:
        """Get ready."""
        return True

    def alone(self) -> Iterator[None]:
        """Read the text."""
        state, total = self.model.new_state(), self.values
        for part in chunks(len(self.ids), _ALONE):
            outputs = self.model.outputs(self.ids[part], state)
            check_finite(self.model, outputs)
            total = total + outputs.astype(np.float64).sum(axis=0)
            yield
        self.values = total / (np.linalg.norm(total) or 1.0)

    def goes_on(self) -> Completion | None:
        """Return nothing, since the vector is whole."""
        return None

    def cancel(self) -> None:
        """End the work after the part in work."""
        self.cancelled = True
