"""Lines of a chat that begin with a slash: what a command is, and how chats word things."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rwkv_cli.engine.completion import Result
from rwkv_cli.terminal.output import counted

ALIASES = {
    "/bye": "/exit",
    "/quit": "/exit",
    "/clear": "/reset",
    "/new": "/reset",
    "/regen": "/retry",
    "/show": "/params",
    "/?": "/help",
}
"""The names that other chat programs have for these commands."""


def no_words() -> Iterable[str]:
    """Return no words, for commands that take none or any."""
    return ()


@dataclass(frozen=True)
class Command:
    """A line that begins with a slash. `act` is called with the rest of the line."""

    usage: str
    help: str
    act: Callable[[str], None]
    words: Callable[[], Iterable[str]] = no_words
    """The words that may come after the name."""

    def takes(self, rest: str) -> bool:
        """Return whether a line may go on like this: usage in brackets may be left out, other usage may not."""
        return bool(self.usage) if rest else self.usage == "" or self.usage.startswith("[")


def not_known(name: str, commands: Iterable[str]) -> str:
    """Say that there is no command of this name, and which one is nearest."""
    near = difflib.get_close_matches(name, commands, 1)
    return f"{name} is not a command; " + (f"did you mean {near[0]}?" if near else "/help lists them")


def unescaped(line: str) -> str:
    """Return the text of a line. A text that begins with a slash is typed with two."""
    return line[1:] if line.startswith("//") else line


def short(text: str) -> str:
    """Return the first line of a text, cut to 60 characters."""
    line = text.split("\n", 1)[0]
    return line if line == text and len(line) <= 60 else line[:60] + " …"


def figures(r: Result) -> str:
    """Say how many tokens were made and read, and how fast."""
    made = counted(r.tokens, "token") + (f", {r.tokens / r.seconds:.1f} tok/s" if r.seconds else "")
    read = f"prompt {counted(r.prompt_tokens, 'token')}"
    read += f", {r.prompt_tokens / r.prompt_seconds:.0f} tok/s" if r.prompt_seconds else ""
    return f"{made} · {read}" + (f" · {drafts(r)}" if r.drafted else "")


def drafts(r: Result) -> str:
    """Say how many of the tokens that were read ahead were right."""
    return f"{r.accepted} of {counted(r.drafted, 'drafted token')} right"
