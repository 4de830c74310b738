"""Templates: the ways to write a chat that models were trained on.

Sources: ChatRWKV API_DEMO_CHAT.py (World), v2/chat.py (Raven), RWKV-LM RWKV-v7/RWKV7-G1x-templates.txt (G1), g1h.py.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rwkv_cli.engine import g1h
from rwkv_cli.engine.forms import THINK, Template
from rwkv_cli.engine.sampling import Sampling

_WORLD_SAMPLING = Sampling(1.0, 0.3, presence_penalty=0.5, frequency_penalty=0.5)
_GREETING = (
    "Hi. I am your assistant and I will provide expert full response in full details. "
    "Please feel free to ask any question and I will always answer it."
)

_ALL = (
    Template(
        "world", "User: {text}\n\nAssistant:", ("\n\n",), _WORLD_SAMPLING, f"User: hi\n\nAssistant: {_GREETING}\n\n"
    ),
    # Reasoning and answers may hold blank lines, so only the next turn ends an answer.
    Template("g1", "User: {text}\n\nAssistant:", ("\n\nUser:",), _WORLD_SAMPLING, modes=THINK),
    g1h.STYLES["bot"],
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
TEMPLATES: dict[str, Template] = {template.name: template for template in _ALL}

_SERIES = dict.fromkeys("abcdefg", "g1") | dict.fromkeys("hijk", "g1h")
"""The template of each known G1 series, by its letter."""

_G1H_FROM = 20260710
"""The date of the first model of G1h's template."""


class Recognized(NamedTuple):
    """A template told from a file's name and vocabulary."""

    name: str
    sure: bool
    """False if the name says neither a known series nor a known kind of model."""


def recognize(name: str, tokenizer: str | None, vocab: int) -> Recognized:
    """Tell the template of a checkpoint from its file's name and its vocabulary."""
    name = name.lower()
    if "raven" in name:
        return Recognized("raven", True)
    date = re.search(r"(?<![0-9])20[0-9]{6}(?![0-9])", name)
    new = date is not None and int(date[0]) >= _G1H_FROM
    series = re.search(r"(?<![a-z0-9])g([0-9])(?:([a-z])[0-9]*)?(?![a-z0-9])", name)
    if series is not None:
        number, letter = series.groups()
        if number == "0" or (number == "1" and letter in _SERIES):
            return Recognized(_SERIES.get(letter, "g1") if number == "1" else "g1", True)
        if number == "1" and not letter:
            return Recognized("g1h" if new else "g1", not new)
        return Recognized("g1h", False)
    if re.search(r"(?<![a-z0-9])g[01](?![0-9])", name):
        return Recognized("g1h" if new else "g1", False)
    if tokenizer == "world":
        return Recognized("g1h" if new and "world" not in name else "world", "world" in name)
    if name.startswith("storyteller"):  # the bundled model
        return Recognized("plain", True)
    return Recognized("qa" if 50254 <= vocab <= 50432 else "plain", "pile" in name)


class Splitter:
    """The split of an answer into reasoning and text. It takes the answer in pieces.

    Reasoning stands between <think> and </think> at the beginning of an answer. A tag anywhere else is text.
    Tags and the blanks around them are left out.
    """

    def __init__(self) -> None:
        self._thinking, self._held, self._first = False, "", True
        self._started = False
        """True once the part at hand has shown more than blanks."""

    def push(self, piece: str) -> Iterator[tuple[bool, str]]:
        """Take a piece, and yield what is certain now, each part with whether it is reasoning."""
        opening, closing = "<think>", "</think>"
        self._held += piece
        if self._first:
            self._held = self._held.lstrip()
            if opening.startswith(self._held[: len(opening)]) and len(self._held) < len(opening):
                return  # this may still become the tag
            self._first = False
            if self._held.startswith(opening):
                self._thinking, self._held = True, self._held[len(opening) :]
        if self._thinking:
            shown, tag, rest = self._held.partition(closing)
            if tag:
                shown = shown.rstrip()
            else:  # the beginning of a possible tag waits, and so do the blanks before it
                keep = next((n for n in range(len(closing) - 1, 0, -1) if shown.endswith(closing[:n])), 0)
                keep += len(shown[: len(shown) - keep]) - len(shown[: len(shown) - keep].rstrip())
                shown, rest = shown[: len(shown) - keep], shown[len(shown) - keep :]
            shown = shown if self._started else shown.lstrip()
            if shown:
                self._started = True
                yield True, shown
            self._held = rest
            if not tag:
                return
            self._thinking = self._started = False
        shown, self._held = self._held if self._started else self._held.lstrip(), ""
        if shown:
            self._started = True
            yield False, shown

    def end(self) -> Iterator[tuple[bool, str]]:
        """Yield what was held back when the answer ends."""
        if self._held:
            yield self._thinking, self._held.rstrip() if self._thinking else self._held
            self._held = ""


def parts(pieces: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Yield an answer's pieces, each with whether it is reasoning (`Splitter`)."""
    splitter = Splitter()
    for piece in pieces:
        yield from splitter.push(piece)
    yield from splitter.end()
