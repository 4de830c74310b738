"""A chat: its turns, and the states between them that make undo and retry exact."""

import itertools
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import Any

from rwkv_cli.engine.completion import Completion, OnRead, Request, new_sampler
from rwkv_cli.engine.forms import Template
from rwkv_cli.engine.messages import Chat
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.engine.speculation import Speculation
from rwkv_cli.engine.templates import parts
from rwkv_cli.errors import ConversationError
from rwkv_cli.kernels.cpu.cores import memory_bytes
from rwkv_cli.models import State

Bar = Callable[[int], AbstractContextManager[OnRead]]
"""A function of the number of tokens to read. Its block gets a function to call with the number read so far."""


def _no_bar(_: int) -> AbstractContextManager[OnRead]:
    return nullcontext(lambda _: None)


_SNAPSHOTS = 32
"""States to go back to. The oldest are given up first: further back, what was said is read once more."""
_SNAPSHOT_BYTES = min(1 << 29, memory_bytes() // 32)
"""Bytes of memory for them."""


@dataclass(frozen=True)
class Snapshot:
    """The facts that the next answer depends on, but for the settings. Nothing in a snapshot changes."""

    state: State
    unread: str
    """The text before the next turn that the state has not read."""
    random: dict[str, Any]
    """Position in the sampler's random numbers."""
    read: str = ""
    """The text that the state has read, where the template writes each prompt from the beginning."""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    draft: State | None = None
    """The state that the drafter goes on from, if it knows this place."""


@dataclass
class Turn:
    """One text of the user, and the answer to it."""

    user: str
    answer: str
    """The model's text, reasoning and tags included."""
    before: Snapshot | None
    """The snapshot that undo goes back to, or None where it was given up."""

    def shown(self) -> str:
        """Return the answer without its reasoning."""
        return "".join(text for thinking, text in parts([self.answer]) if not thinking)

    def written(self, template: Template) -> str:
        """Write the turn as the model reads it, without what follows the answer."""
        return template.past(self.user, self.answer)


@dataclass
class Conversation:
    """A model, a way to talk with it, and what was said. `now` moves on with each whole turn."""

    model: LanguageModel
    template: Template
    settings: Sampling
    seed: int | None = None
    """Seed of the random numbers. None takes new ones with each beginning."""
    max_tokens: int | None = None
    _: KW_ONLY
    system: str = ""
    think: str = "off"
    start: State | None = None
    """The state before the first word, where it is not the model's own."""
    speculation: Speculation | None = None
    """The passes of all answers, if they read guesses ahead."""

    def __post_init__(self) -> None:
        self.template.mode(self.think)
        self.reset()

    def reset(self) -> None:
        """Go back to before the first turn, with the random numbers too."""
        self.sampler = new_sampler(self.model, self.settings, self.seed)
        self.turns: list[Turn] = []
        self.now = self._beginning()

    def _beginning(self) -> Snapshot:
        """Return a snapshot before the first turn."""
        return Snapshot(self._first_state(), self.template.begin(self.system), self.sampler.random)

    def _first_state(self) -> State:
        """Return the state before the first word."""
        return self.model.new_state() if self.start is None else self.start

    def anew(self, system: str) -> "Conversation":
        """Return a new conversation with these settings and another system text. This one stays as it is."""
        return replace(self, system=system)

    def reply(self, text: str, again: bool = False, random: dict[str, Any] | None = None) -> "Reply":
        """Prepare the model's answer to `text`. With `again` it takes the last turn's place, once it is made.

        `random` takes the place of the random numbers that belong there. Raises ConversationError where there is no
        last turn, and TokenizerError.
        """
        before = self._before_last() if again else self.now
        self.sampler.settings = self.settings
        self.sampler.random = random or before.random
        self.sampler.forget()  # an answer is penalized for its own repetitions only
        turns = self.turns[:-1] if again else self.turns
        written, read, state = self._written(text, before, turns)
        prompt = ([] if turns else self.template.first_ids) + self.encode(written)
        if not prompt:
            raise ConversationError("the tokenizer makes nothing of this turn; say it in other words")
        request = Request(prompt, self.limit, self.template.stops)
        if self.speculation is not None:
            self.speculation.drafter.go_back(before.draft if state is before.state else None)
        return Reply(
            conversation=self,
            user=text,
            before=before,
            again=again,
            start=self.template.begun(written, self.think),
            whole=read + written,
            completion=Completion(self.model, state.clone(), self.sampler, request, speculation=self.speculation),
        )

    def _written(self, text: str, before: Snapshot, turns: Sequence[Turn]) -> tuple[str, str, State]:
        """Write the prompt of a turn. Returns what is to be read, the text before it, and the state there."""
        if self.template.turn_by_turn:
            return before.unread + self.template.prompt(text, self.think), "", before.state
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in turns:
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
        whole = self.template.whole(Chat([*messages, {"role": "user", "content": text}]), self.think)
        if before.read and whole.startswith(before.read):
            return whole[len(before.read) :], before.read, before.state
        return whole, "", self._first_state()

    def undo(self) -> Turn:
        """Take the last turn back, so that everything is as before it. Raises ConversationError if there is none."""
        self.now = self._before_last()
        return self.turns.pop()

    def last(self) -> Turn:
        """Return the last turn. Raises ConversationError if there is none."""
        if not self.turns:
            raise ConversationError("there is no turn yet")
        return self.turns[-1]

    def _before_last(self) -> Snapshot:
        """Return the snapshot before the last turn. Raises ConversationError if there is none."""
        self.recall()
        before = self.last().before
        assert before is not None, "it was recalled"
        return before

    def recall(self, bar: Bar = _no_bar) -> None:
        """Make the snapshot before the last turn anew where it was given up: what was said is read once more.

        An exception in the bar's function ends the reading, and nothing has changed.
        """
        if not self.turns or self.turns[-1].before is not None:
            return
        *earlier, last = self.turns
        random = (self.sampler if earlier else new_sampler(self.model, self.settings, self.sampler.seed)).random
        if not self.template.turn_by_turn:  # the next prompt has all of it
            last.before = replace(self._beginning(), random=random)
            return
        kept = [(at, turn.before) for at, turn in enumerate(earlier) if turn.before is not None]
        first, before = kept[-1] if kept else (0, self._beginning())
        ends = self.template.end
        text = ends.join(turn.written(self.template) for turn in earlier[first:])
        ids, state = self.encode(before.unread + text) if text else [], before.state.clone()
        ids = self.template.first_ids + ids if text and first == 0 else ids
        with bar(len(ids)) as on_read:
            if ids:
                self.model.advance(ids, state, watch=on_read)
        last.before = Snapshot(state, ends if text else before.unread, random)

    def retry(self) -> "Reply":
        """Prepare another answer to the last turn, from the state before it with the next random numbers."""
        self._before_last()
        return self.reply(self.turns[-1].user, True, self.now.random)

    def set_think(self, mode: str) -> None:
        """Change the think mode, and with it the settings that are still those of the mode before.

        Raises ConversationError for a mode that is unknown or that the template lacks.
        """
        self.template.mode(mode)
        before, after = (asdict(self.template.sampling_for(think)) for think in (self.think, mode))
        now = asdict(self.settings)
        self.settings = self.settings.changed(**{key: after[key] for key in now if now[key] == before[key]})
        self.think = mode

    def set_seed(self, seed: int) -> None:
        """Take the random numbers of a chat that begins with this seed, here and wherever undo leads."""
        self.seed = seed
        self.sampler = new_sampler(self.model, self.settings, seed)
        self.now = replace(self.now, random=self.sampler.random)
        for turn in self.turns:
            turn.before = turn.before and replace(turn.before, random=self.sampler.random)

    @property
    def limit(self) -> int:
        """The most tokens of an answer. Reasoning needs more room."""
        return self.max_tokens or (4096 if self.think in ("on", "short", "long") else 1024)

    def encode(self, text: str) -> list[int]:
        """Encode a prompt, with blank lines as the model knows them."""
        return self.template.encode(self.model.text_tokenizer, text)

    def finish(self, reply: "Reply") -> None:
        """Move on to after an answer. The oldest snapshots are given up if there are too many."""
        state, result = reply.completion.state, reply.completion.result
        if reply.again:
            self.turns.pop()
        self.turns.append(Turn(reply.user, (reply.start + result.text).strip(), reply.before))
        whole = reply.whole + result.text
        read = "" if self.template.turn_by_turn else whole[: len(whole) - len(result.unread)]
        draft = self.speculation.drafter.mark() if self.speculation is not None else None
        self.now = Snapshot(state, self.template.close(result.unread), self.sampler.random, read, draft=draft)
        size = sum(array.nbytes for array in state.arrays().values())
        for old in self.turns[: -min(max(_SNAPSHOT_BYTES // size, 1), _SNAPSHOTS)]:
            old.before = None


@dataclass(kw_only=True)
class Reply:
    """An answer in the making. `stream` makes it, and `completion.cancel` ends it early."""

    conversation: Conversation
    user: str
    before: Snapshot
    again: bool
    """True if the answer takes the last turn's place."""
    start: str
    """The text that the answer is made to begin with."""
    whole: str
    """The prompt from the beginning of the conversation, or from the last turn where that is all that is known."""
    completion: Completion

    def stream(self, on_read: OnRead | None = None) -> Iterator[tuple[bool, str]]:
        """Yield pieces of the answer, each with whether it is reasoning.

        An answer that is cancelled before its first piece never happened.
        """
        pieces = self.completion.stream(on_read)
        first = next(pieces, "")
        if self.happened():
            yield from parts(itertools.chain([self.start, first], pieces))
            self.conversation.finish(self)

    def happened(self) -> bool:
        """Return whether the answer was not cancelled before its first piece."""
        return self.completion.result.stop != "interrupted" or bool(self.completion.result.text)


def markdown(title: str, turns: Iterable[Turn]) -> str:
    """Write a conversation as a document."""
    said = "".join(f"**You:** {turn.user}\n\n{turn.shown().strip()}\n\n" for turn in turns)
    return f"# Chat with {title}\n\n{said}"
