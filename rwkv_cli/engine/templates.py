"""How a chat is written for a model, by what it was trained on.

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

THINK = {
    "off": ("", ""),
    "on": ("", "<think"),
    "short": (" (think a bit)", "<think"),
    "long": (" (think a lot)", "<think"),
    "fast": ("", "<think>\n</think"),
}
"""Think modes: what is added to the user's text, and how the answer is made to begin. The model writes the `>`."""


@dataclass(frozen=True)
class Template:
    """One way to write turns: `turn` holds {text}; an answer ends at any of `stops`, and `end` follows it."""

    name: str
    turn: str
    stops: tuple[str, ...]
    sampling: Sampling
    opening: str = ""
    """What comes first, unless a system text takes its place."""
    system: str = "System: {text}\n\n"
    end: str = "\n\n"
    thinks: bool = False
    """Whether the model was trained to reason between <think> and </think>."""
    single_newlines: bool = False
    """Whether a blank line is two tokens of one line break each, never one of two (ChatRWKV v2/chat.py, fix_tokens)."""

    def begin(self, system: str) -> str:
        """What comes before the first turn."""
        return self.system.format(text=_closed_up(system)) if system else self.opening

    def prompt(self, text: str, think: str = "off") -> str:
        """A user's turn up to where the model answers. Blank lines are closed up, since they would end the turn."""
        request, start = THINK[think]
        return self.turn.format(text=_closed_up(text) + request) + (f" {start}" if start else "")


def _closed_up(text: str) -> str:
    return re.sub(r"\n\s*\n", "\n", text.replace("\r\n", "\n").strip())


_ALL = (
    Template(
        "world", "User: {text}\n\nAssistant:", ("\n\n",), _WORLD_SAMPLING, f"User: hi\n\nAssistant: {_GREETING}\n\n"
    ),
    # reasoning and answers may hold blank lines, so only the next turn ends one
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
    """The template for a checkpoint, from its file name and vocabulary."""
    name = name.lower()
    if "raven" in name:
        return "raven"
    if re.search(r"(?<![a-z0-9])g[01](?![0-9])", name):
        return "g1"
    if tokenizer == "world":
        return "world"
    return "qa" if 50254 <= vocab <= 50432 else "plain"


def parts(pieces: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """An answer's pieces, each with whether it is reasoning; tags and the blanks around them are left out.

    Reasoning is what an answer begins with between <think> and </think>; a tag anywhere else is text.
    """
    opening, closing = "<think>", "</think>"
    thinking, held, first = False, "", True
    started = False  # whether the part at hand has shown anything but blanks
    for piece in pieces:
        held += piece
        if first:
            held = held.lstrip()
            if opening.startswith(held[: len(opening)]) and len(held) < len(opening):
                continue  # may still become the tag
            first = False
            if held.startswith(opening):
                thinking, held = True, held[len(opening) :]
        if thinking:
            shown, tag, rest = held.partition(closing)
            if tag:
                shown = shown.rstrip()
            else:  # what may begin the tag, and blanks before it, wait
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
