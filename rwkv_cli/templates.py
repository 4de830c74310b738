"""How a chat is written for a model, by what it was trained on.

Sources: ChatRWKV API_DEMO_CHAT.py (World), v2/chat.py (Raven), RWKV-LM RWKV-v7/RWKV7-G1x-templates.txt (G1).
"""

import re
from dataclasses import dataclass

from rwkv_cli.sampling import Sampling

_WORLD_SAMPLING = Sampling(1.0, 0.3, presence_penalty=0.5, frequency_penalty=0.5)
_GREETING = (
    "Hi. I am your assistant and I will provide expert full response in full details. "
    "Please feel free to ask any question and I will always answer it."
)


@dataclass(frozen=True)
class Template:
    """One way to write turns: `turn` holds {text}; an answer ends at any of `stops`, and `end` follows it."""

    turn: str
    stops: tuple[str, ...]
    sampling: Sampling
    opening: str = ""
    end: str = "\n\n"

    def prompt(self, text: str) -> str:
        """A user's turn up to where the model answers. Blank lines are closed up, since they would end the turn."""
        return self.turn.format(text=re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n").strip()))


TEMPLATES = {
    "world": Template(
        "User: {text}\n\nAssistant:", ("\n\n",), _WORLD_SAMPLING, f"User: hi\n\nAssistant: {_GREETING}\n\n"
    ),
    # reasoning and answers may hold blank lines, so only the next turn ends one
    "g1": Template("User: {text}\n\nAssistant:", ("\n\nUser:",), _WORLD_SAMPLING),
    "raven": Template(
        "Bob: {text}\n\nAlice:",
        ("\n\n", "\nBob:"),
        Sampling(1.2, 0.5, presence_penalty=0.4, frequency_penalty=0.4),
    ),
    "qa": Template("Q: {text}\n\nA:", ("\n\n", "\nQ:"), Sampling(), "\n"),
    "plain": Template("User: {text}\n\nAssistant:", ("\n\n",), Sampling()),
}


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
