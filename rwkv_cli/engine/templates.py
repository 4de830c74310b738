"""Templates: the ways to write a chat that models were trained on.

Sources: ChatRWKV API_DEMO_CHAT.py (World), v2/chat.py (Raven), RWKV-LM RWKV-v7/RWKV7-G1x-templates.txt (G1).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rwkv_cli.engine.sampling import Sampling

_WORLD_SAMPLING = Sampling(1.0, 0.3, presence_penalty=0.5, frequency_penalty=0.5)
_GREETING = (
    "Hi. I am your assistant and I will provide expert full response in full details. "
    "Please feel free to ask any question and I will always answer it."
)


@dataclass(frozen=True)
class ThinkMode:
    """One way to have a model reason. The model writes the `>` after the start itself."""

    request: str = ""
    """The text that is added to the user's."""
    start: str = ""
    """The beginning of the answer."""


THINK = {
    "off": ThinkMode(),
    "on": ThinkMode("", "<think"),
    "short": ThinkMode(" (think a bit)", "<think"),
    "long": ThinkMode(" (think a lot)", "<think"),
    "fast": ThinkMode("", "<think>\n</think"),
}


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
    thinks: bool = False
    """True if the model was trained to reason between <think> and </think>."""
    single_newlines: bool = False
    """True if a blank line is two tokens of one line break each, never one token (ChatRWKV v2/chat.py, fix_tokens)."""

    def begin(self, system: str) -> str:
        """Write the text before the first turn."""
        return self.system.format(text=_closed_up(system)) if system else self.opening

    def prompt(self, text: str, think: str = "off") -> str:
        """Write a user's turn up to the model's answer. Blank lines are closed up, since they would end the turn."""
        mode = THINK[think]
        return self.turn.format(text=_closed_up(text) + mode.request) + (f" {mode.start}" if mode.start else "")


def _closed_up(text: str) -> str:
    """Return a text without blank lines and blanks around it."""
    return re.sub(r"\n\s*\n", "\n", text.replace("\r\n", "\n").strip())


_ALL = (
    Template(
        "world", "User: {text}\n\nAssistant:", ("\n\n",), _WORLD_SAMPLING, f"User: hi\n\nAssistant: {_GREETING}\n\n"
    ),
    # Reasoning and answers may hold blank lines, so only the next turn ends an answer.
    Template("g1", "User: {text}\n\nAssistant:", ("\n\nUser:",), _WORLD_SAMPLING, thinks=True),
    Template(
        "raven",
        "Bob: {text}\n\nAlice:",
        ("\n\n", "\nBob:"),
        Sampling(1.2, 0.5, presence_penalty=0.4, frequency_penalty=0.4),
        system="{text}\n\n",
        single_newlines=True,
    ),
    Template("qa", "Q: {text}\n\nA:", ("\n\n", "\nQ:"), Sampling(), "\n", "{text}\n\n", single_newlines=True),
    Template("plain", "User: {text}\n\nAssistant:", ("\n\n",), Sampling(temperature=0.8)),
)
TEMPLATES = {template.name: template for template in _ALL}


def guess(name: str, tokenizer: str | None, vocab: int) -> str:
    """Guess the template of a checkpoint from its file name and vocabulary."""
    name = name.lower()
    if "raven" in name:
        return "raven"
    if re.search(r"(?<![a-z0-9])g[01](?![0-9])", name):
        return "g1"
    if tokenizer == "world":
        return "world"
    return "qa" if 50254 <= vocab <= 50432 else "plain"


def parts(pieces: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Yield an answer's pieces, each with whether it is reasoning. Tags and the blanks around them are left out.

    Reasoning stands between <think> and </think> at the beginning of an answer. A tag anywhere else is text.
    """
    opening, closing = "<think>", "</think>"
    thinking, held, first = False, "", True
    started = False  # true once the part at hand has shown more than blanks
    for piece in pieces:
        held += piece
        if first:
            held = held.lstrip()
            if opening.startswith(held[: len(opening)]) and len(held) < len(opening):
                continue  # this may still become the tag
            first = False
            if held.startswith(opening):
                thinking, held = True, held[len(opening) :]
        if thinking:
            shown, tag, rest = held.partition(closing)
            if tag:
                shown = shown.rstrip()
            else:  # the beginning of a possible tag waits, and so do the blanks before it
                keep = next((n for n in range(len(closing) - 1, 0, -1) if shown.endswith(closing[:n])), 0)
                keep += len(shown[: len(shown) - keep]) - len(shown[: len(shown) - keep].rstrip())
                shown, rest = shown[: len(shown) - keep], shown[len(shown) - keep :]
            shown = shown if started else shown.lstrip()
            if shown:
                started = True
                yield True, shown
            held = rest
            if not tag:
                continue
            thinking = started = False
        shown, held = held if started else held.lstrip(), ""
        if shown:
            started = True
            yield False, shown
    if held:
        yield thinking, held.rstrip() if thinking else held
