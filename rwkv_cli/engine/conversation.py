"""A chat: turns, and the states between them, which make undo and retry exact."""

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from rwkv_cli.engine.completion import Completion, new_sampler
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.engine.templates import THINK, Template, parts
from rwkv_cli.errors import ConversationError
from rwkv_cli.models import State

_SNAPSHOT_BYTES = 1 << 29
"""Most memory for states to go back to; the oldest are given up first."""


@dataclass(frozen=True)
class Snapshot:
    """All that the next answer depends on, but for the settings. Nothing in it is changed once it is made."""

    state: State
    unread: str
    """Text that comes before the next turn and that the state has not read."""
    random: dict[str, Any]
    """The sampler's generator."""
    id: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass
class Turn:
    user: str
    answer: str
    """As the model wrote it, reasoning and tags included."""
    before: Snapshot | None
    """Where undo leads; None where it was given up."""

    def shown(self) -> str:
        """The answer without its reasoning."""
        return "".join(text for thinking, text in parts([self.answer]) if not thinking)


@dataclass
class Conversation:
    """A model, a way to talk with it, and what was said. `now` moves on with each whole turn."""

    model: LanguageModel
    template: Template
    settings: Sampling
    seed: int | None = None
    """None: new random numbers with each beginning."""
    max_tokens: int | None = None
    system: str = ""
    think: str = "off"
    start: State | None = None
    """The state before the first word, when it is not the model's own."""

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Back to before the first turn, the random numbers too."""
        state = self.model.new_state() if self.start is None else self.start
        self.sampler = new_sampler(self.model, self.settings, self.seed)
        self.turns: list[Turn] = []
        self.now = Snapshot(state, self.template.begin(self.system), self.sampler.random)

    def reply(self, text: str, again: bool = False, random: dict[str, Any] | None = None) -> "Reply":
        """The model's answer to `text`, to be iterated; `again`: in the place of the last turn, once it is made.

        `random` takes the place of the random numbers that belong there. Raises ConversationError where the last turn
        cannot be taken back, TokenizerError.
        """
        before = self._before_last() if again else self.now
        self.sampler.settings = self.settings
        self.sampler.random = random or before.random
        self.sampler.forget()  # penalties are for repetition within an answer
        start = THINK[self.think][1]
        state = before.state.clone()
        completion = Completion(self.model, state, self.sampler, self.limit, self.template.stops)
        prompt = self.encode(before.unread + self.template.prompt(text, self.think))
        return Reply(self, text, before, again, prompt, start, completion)

    def undo(self) -> Turn:
        """Take the last turn back: everything is as it was before it. Raises ConversationError if that cannot be."""
        self.now = self._before_last()
        return self.turns.pop()

    def last(self) -> Turn:
        """The last turn. Raises ConversationError if there is none."""
        if not self.turns:
            raise ConversationError("there is no turn to take back")
        return self.turns[-1]

    def _before_last(self) -> Snapshot:
        before = self.last().before
        if before is None:
            raise ConversationError("the state before that turn is no longer kept; /reset begins anew")
        return before

    def retry(self) -> "Reply":
        """Another answer to the last turn, from the state before it but with the random numbers that come next."""
        self._before_last()
        return self.reply(self.turns[-1].user, True, self.now.random)

    def set_think(self, mode: str) -> None:
        """Change the think mode. Raises ConversationError for one that is none, or that the template lacks."""
        if mode not in THINK:
            raise ConversationError(f"{mode} is no think mode; there are {', '.join(THINK)}")
        if mode != "off" and not self.template.thinks:
            raise ConversationError(f"template {self.template.name} does not reason; --template g1 does")
        self.think = mode

    def set_seed(self, seed: int) -> None:
        """Go on, here and wherever undo leads, with the random numbers of a chat that begins with this seed."""
        self.seed = seed
        self.sampler = new_sampler(self.model, self.settings, seed)
        self.now = replace(self.now, random=self.sampler.random)
        for turn in self.turns:
            turn.before = turn.before and replace(turn.before, random=self.sampler.random)

    @property
    def limit(self) -> int:
        """Most tokens of an answer; reasoning takes room."""
        return self.max_tokens or (4096 if self.think in ("on", "short", "long") else 1024)

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, blank lines as the model knows them."""
        tokenizer = self.model.text_tokenizer
        ids = tokenizer.encode(text)
        if not self.template.single_newlines:
            return ids
        one, two = tokenizer.encode("\n"), tokenizer.encode("\n\n")
        if len(one) != 1 or len(two) != 1:
            return ids
        return [part for token in ids for part in (one * 2 if token == two[0] else [token])]

    def finish(self, reply: "Reply") -> None:
        """Move on to after an answer; give up the oldest snapshots if there are too many."""
        done = reply.completion
        if reply.again:
            self.turns.pop()
        self.turns.append(Turn(reply.user, (reply.start + done.text).strip(), reply.before))
        self.now = Snapshot(done.state, done.unread + self.template.end, self.sampler.random)
        size = sum(array.nbytes for array in done.state.arrays().values())
        for old in self.turns[: -max(_SNAPSHOT_BYTES // size, 1)]:
            old.before = None


@dataclass
class Reply:
    """An answer in the making. Iterate it; set `completion.cancelled` to end it."""

    conversation: Conversation
    user: str
    before: Snapshot
    again: bool
    """Whether it takes the last turn's place."""
    prompt: list[int]
    """What the state has to read first."""
    start: str
    """What the answer was made to begin with."""
    completion: Completion

    def __iter__(self) -> Iterator[tuple[bool, str]]:
        """Pieces, each with whether it is reasoning. Interrupted before there was one, it never happened."""
        done = self.completion
        yield from parts(self._pieces())
        if done.stop != "interrupted" or done.text:
            self.conversation.finish(self)

    def _pieces(self) -> Iterator[str]:
        if self.start:
            yield self.start
        yield from self.completion.run(self.prompt)


def markdown(title: str, turns: Iterable[Turn]) -> str:
    """A conversation as a document."""
    said = "".join(f"**You:** {turn.user}\n\n{turn.shown().strip()}\n\n" for turn in turns)
    return f"# Chat with {title}\n\n{said}"
