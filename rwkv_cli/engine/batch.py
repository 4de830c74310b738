"""Several completions that share a model's forward passes."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rwkv_cli.engine.completion import Completion, Steps
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.models import State


@dataclass
class _Member:
    """A completion in a batch, and the ids that its state has to read next."""

    completion: Completion
    steps: Steps
    ids: Sequence[int]


class Batch:
    """Completions of one model that share its forward passes. Each makes the text that it would make alone."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._members: list[_Member] = []
        self._state: State | None = None
        """The states of all members, in their order. None when the members have changed."""

    def __len__(self) -> int:
        return len(self._members)

    def add(self, completion: Completion) -> None:
        """Take in a completion that has not begun. Its state becomes a view into the batch's: clone it to keep it."""
        steps = completion.steps()
        self._members.append(_Member(completion, steps, next(steps)))
        self._state = None

    def step(self) -> list[Completion]:
        """Make one pass: each member reads up to a chunk of its prompt or its last token. Returns those that ended."""
        if self._state is None:
            self._state = State.stack([member.completion.state for member in self._members])
        logits = self.model.advance_batch([member.ids for member in self._members], self._state)
        # The rows are taken after the pass: the device may have taken the state in, and left earlier rows behind.
        for b, member in enumerate(self._members):
            member.completion.state = self._state.row(b)
        running, ended = [], []
        for member, row in zip(self._members, logits, strict=True):
            try:
                member.ids = member.steps.send(row)
                running.append(member)
            except StopIteration:
                ended.append(member.completion)
        self._members = running
        if ended:
            self._state = None
        return ended

    def running(self) -> list[Completion]:
        """The completions that have not ended."""
        return [member.completion for member in self._members]


def complete_together(
    model: LanguageModel, completions: Iterable[Completion], size: int
) -> Iterator[tuple[list[Completion], list[Completion]]]:
    """Make many texts, up to `size` at a time. Where one ends, the next of `completions` begins.

    After each pass this yields the completions that ended with it, and those in the making.
    """
    batch, waiting = Batch(model), iter(completions)
    while True:
        for completion in itertools.islice(waiting, size - len(batch)):
            batch.add(completion)
        if not len(batch):
            return
        ended = batch.step()
        yield ended, batch.running()
