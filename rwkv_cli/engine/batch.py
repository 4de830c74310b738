"""Several completions that share a model's forward passes."""

from collections.abc import Sequence

from rwkv_cli.engine.completion import Completion, Steps
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.models import State


class Batch:
    """Completions of one model that share its forward passes. Each makes the text that it would make alone."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._running: list[tuple[Completion, Steps, Sequence[int]]] = []
        self._state: State | None = None
        """Of all that run, in their order; None when others run than before."""

    def add(self, completion: Completion, prompt: Sequence[int]) -> None:
        """Take in one that has not begun. Its state becomes a view into the batch's: clone it to keep it."""
        steps = completion.steps(prompt)
        self._running.append((completion, steps, next(steps)))
        self._state = None

    def step(self) -> list[Completion]:
        """One pass: each reads its next token, or up to CHUNK of its prompt, and picks another. Those that ended."""
        if self._state is None:
            self._state = State.stack([completion.state for completion, _, _ in self._running])
        logits = self.model.advance_batch([ids for _, _, ids in self._running], self._state)
        # only now: the device may have taken the state in, and what was a row of it before would stay behind
        for b, (completion, _, _) in enumerate(self._running):
            completion.state = self._state.row(b)
        running, ended = [], []
        for (completion, steps, _), row in zip(self._running, logits, strict=True):
            try:
                running.append((completion, steps, steps.send(row)))
            except StopIteration:
                ended.append(completion)
        self._running = running
        if ended:
            self._state = None
        return ended
