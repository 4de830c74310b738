"""Several completions that share a model's forward passes."""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rwkv_cli.engine.completion import Completion, Logits, Steps
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.speculation import Speculation
from rwkv_cli.models import State

_SIZES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
"""Numbers of rows that a batch may have. A program is made for each, and rows without a member cost next to nothing."""


@dataclass
class _Member:
    """A completion in a batch, its row, and the ids that its state has to read next."""

    completion: Completion
    steps: Steps
    ids: Sequence[int]
    row: int = -1


class Batch:
    """Completions of one model that share its forward passes. Each makes the text that it would make alone."""

    def __init__(self, model: LanguageModel, speculation: Speculation | None = None) -> None:
        """`speculation` guesses ahead for a text that is alone. Several texts fill the passes themselves."""
        self.model, self._speculation = model, speculation
        self._guessed: Completion | None = None
        """The completion that the speculation has begun with."""
        self._members: list[_Member] = []
        self._state: State | None = None
        """The states of all members, each in its row, and rows that are free."""
        self._rows = 0

    def __len__(self) -> int:
        return len(self._members)

    def add(self, completion: Completion) -> None:
        """Take in a completion that has not begun. Its state becomes a view into the batch's: clone it to keep it."""
        steps = completion.steps()
        self._members.append(_Member(completion, steps, next(steps)))

    def step(self, most: int | None = None) -> list[Completion]:
        """Make one pass: each member reads on in its prompt, or reads its last token. Returns those that ended.

        Where `most` is given, members that have more than a token to read share so many rows evenly, and the others
        wait no longer than these take.
        """
        alone = len(self) == 1 and bool(self._members[0].completion.result.tokens)
        logits = self._read_together(most) if self._speculation is None or not alone else self._read_alone()
        running, ended = [], []
        for member, row in zip(self._members, logits, strict=True):  # they are in the order of their rows
            try:
                if not len(member.ids):
                    member.ids = member.steps.send(row)
                running.append(member)
            except StopIteration:
                ended.append(member.completion)
        self._members = running
        return ended

    def _read_together(self, most: int | None) -> Sequence[Logits]:
        """Have each member read its next ids. Returns the logits [V] after them, in the order of the members."""
        self._guessed = None
        state = self._seated()
        longer = sum(len(member.ids) > 1 for member in self._members)
        share = max(1, most // longer) if most is not None and longer else None
        ids: list[Sequence[int]] = [()] * self._rows
        for member in self._members:
            ids[member.row] = member.ids[:share]
        logits = self.model.advance_batch(ids, state)
        # The rows are taken after the pass: the device may have taken the state in, and left earlier rows behind.
        for member in self._members:
            member.completion.state = state.row(member.row)
            member.ids = member.ids[len(ids[member.row]) :]
        return list(logits)  # members are in the order of their rows

    def _read_alone(self) -> Sequence[Logits]:
        """Have the only member read its next ids, and guesses behind them. Its state leaves the batch's for that."""
        (member,), speculation = self._members, self._speculation
        assert speculation is not None, "it is asked for"
        completion = member.completion
        if self._guessed is not completion:
            text = [*completion.request.prompt, *completion.result.ids]
            speculation.begin(text[: len(text) - len(member.ids)])
            self._guessed, self._state, completion.state = completion, None, completion.state.clone()
        logits, completion.state = speculation.advance(member.ids, completion.state, completion.sampler)
        member.ids = ()
        return [logits]

    def remove(self, completion: Completion) -> None:
        """Give up a member before its end."""
        self._members = [member for member in self._members if member.completion is not completion]

    def running(self) -> list[Completion]:
        """The completions that have not ended."""
        return [member.completion for member in self._members]

    def _seated(self) -> State:
        """Return the state of all members, after those that have come got their rows in it.

        It is made anew where it has too few rows or twice as many as needed. Rows that are free hold anything.
        """
        if self._state is None or not len(self) <= self._rows < 2 * len(self):
            states = [member.completion.state for member in self._members]
            size = bisect.bisect_left(_SIZES, len(states))
            self._rows = max(len(states), _SIZES[size] if size < len(_SIZES) else 0)
            self._state = State.stack([*states, *states[:1] * (self._rows - len(states))])
            for row, member in enumerate(self._members):
                member.row = row
            return self._state
        free = set(range(self._rows)) - {member.row for member in self._members}
        for member in self._members:
            if member.row < 0:
                member.row = free.pop()
                self._state.row(member.row).take(member.completion.state)
        self._members.sort(key=lambda member: member.row)
        return self._state


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
