"""The parts of a chat template: the texts around turns, the ways to reason, and where answers end."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from rwkv_cli.engine.messages import Chat
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.engine.tokenizer import END_OF_TEXT, Tokenizer
from rwkv_cli.errors import ConversationError


@dataclass(frozen=True)
class ThinkMode:
    """One way to have a model reason. The model writes the `>` after the start itself."""

    request: str = ""
    """The text that is added to the user's."""
    start: str = ""
    """The beginning of the answer."""
    skips: bool = False
    """True if the answer begins with reasoning that is empty."""


THINK = {
    "off": ThinkMode(),
    "on": ThinkMode("", "<think"),
    "short": ThinkMode(" (think a bit)", "<think"),
    "long": ThinkMode(" (think a lot)", "<think"),
    "fast": ThinkMode("", "<think>\n</think", skips=True),
}
"""The think modes that there are, as models before G1h know them."""


@dataclass(frozen=True)
class Template:
    """One way to write turns. `turn` holds {text}, an answer ends at any of `stops`, and `end` follows it."""

    name: str
    turn: str
    stops: tuple[str, ...]
    sampling: Sampling
    opening: str = ""
    """The text before the first turn, unless a system text takes its place."""
    system: str = "System: {text}\n\n"
    end: str = "\n\n"
    modes: Mapping[str, ThinkMode] = field(default_factory=lambda: {"off": ThinkMode()})
    """The think modes that the model was trained on."""
    gap: str = " "
    """The text between a turn and an answer that is begun."""
    style: str = ""
    """The name of this way among several of the same template."""
    skipped: Sampling | None = None
    """The sampling of answers whose reasoning is skipped, where that differs."""
    begins_with_end: bool = False
    """True if a conversation begins with token 0, which ends a text."""
    single_newlines: bool = False
    """True if a blank line is two tokens of one line break each, never one token (ChatRWKV v2/chat.py, fix_tokens)."""

    turn_by_turn = True
    """False if a turn may change what is written before it, so that each prompt is written from its beginning."""

    @property
    def thinks(self) -> bool:
        """True if the model was trained to reason between <think> and </think>."""
        return "on" in self.modes

    @property
    def default_think(self) -> str:
        """The think mode where none is chosen."""
        return "on" if self.thinks else "off"

    def mode(self, think: str) -> ThinkMode:
        """Return a think mode. Raises ConversationError for one that is unknown or that the template lacks."""
        if think not in THINK:
            raise ConversationError(f"{think} is no think mode; there are {', '.join(THINK)}")
        if think in self.modes:
            return self.modes[think]
        if not self.thinks:
            raise ConversationError(f"template {self.name} does not reason; --template g1 does")
        raise ConversationError(f"template {self.name} has no think mode {think}; it has {', '.join(self.modes)}")

    def sampling_for(self, think: str) -> Sampling:
        """Return the sampling that the model's authors use in this think mode."""
        return self.skipped if self.skipped is not None and self.mode(think).skips else self.sampling

    @property
    def styles(self) -> list[str]:
        """The styles that the template has. There are none where it is written in one way."""
        return []

    def styled(self, style: str) -> "Template":
        """Return the template in another of its styles. Raises ConversationError where it has none of this name."""
        if style == self.style:
            return self
        raise ConversationError(f"template {self.name} has no style {style}; --template g1h has")

    def for_chat(self, _chat: Chat) -> "Template":
        """Return the style that this chat is written in."""
        return self

    def clean(self, text: str, _role: str = "user") -> str:
        """Return a text without what would end the turn: blank lines, and blanks around it."""
        return re.sub(r"\n\s*\n", "\n", text.replace("\r\n", "\n").strip())

    def begin(self, system: str) -> str:
        """Write the text before the first turn."""
        return self.system.format(text=self.clean(system, "system")) if system else self.opening

    def prompt(self, text: str, think: str = "off") -> str:
        """Write a user's turn up to the model's answer."""
        mode = self.mode(think)
        return self.turn.format(text=self.clean(text) + mode.request) + (
            f"{self.gap}{mode.start}" if mode.start else ""
        )

    def past(self, text: str, answer: str) -> str:
        """Write a turn that was answered, without what follows the answer."""
        return self.turn.format(text=self.clean(text)) + (f"{self.gap}{answer}" if answer else "")

    def begun(self, _prompt: str, think: str) -> str:
        """Return the part of the answer that a prompt has begun."""
        return self.mode(think).start

    def close(self, unread: str) -> str:
        """Write what follows an answer, from its end that the model has not read."""
        return unread + self.end

    def whole(self, chat: Chat, think: str) -> str:
        """Write a whole chat up to the answer to its last message. Raises ConversationError if that cannot be."""
        if chat.uses_tools:
            raise ConversationError(f"template {self.name} cannot write tools; --template g1h can")
        turns = list(chat.messages)
        system = [turns.pop(0)["content"] for _ in range(len(turns)) if turns[0]["role"] == "system"]
        if len(turns) % 2 == 0 or any(m["role"] != ("user", "assistant")[i % 2] for i, m in enumerate(turns)):
            raise ConversationError(f"template {self.name} needs user and assistant to take turns, a user's text last")
        written = self.begin("\n".join(system))
        for user, answer in zip(turns[:-1:2], turns[1::2], strict=True):
            written += self.past(user["content"], answer["content"].strip()) + self.end
        return written + self.prompt(turns[-1]["content"], think)

    def encode(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Encode a prompt, with blank lines as the model knows them."""
        ids = tokenizer.encode(text)
        if not self.single_newlines:
            return ids
        one, two = tokenizer.encode("\n"), tokenizer.encode("\n\n")
        if len(one) != 1 or len(two) != 1:
            return ids
        return [part for token in ids for part in (one * 2 if token == two[0] else [token])]

    @property
    def first_ids(self) -> list[int]:
        """The ids before a conversation's text."""
        return [END_OF_TEXT] if self.begins_with_end else []
