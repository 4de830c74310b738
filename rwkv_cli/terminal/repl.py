"""The chat program: reads turns and commands, shows answers as they come, keeps the session."""

import difflib
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from rwkv_cli.engine import sessions
from rwkv_cli.engine.conversation import Conversation, Reply, markdown
from rwkv_cli.engine.sessions import Session
from rwkv_cli.engine.templates import THINK
from rwkv_cli.errors import ConversationError, SessionError, TokenizerError
from rwkv_cli.quant import replacing
from rwkv_cli.terminal.output import columns, note, reading_bar, write
from rwkv_cli.terminal.reader import is_terminal, no_echo, reader
from rwkv_cli.terminal.settings import MAX_TOKENS, SAMPLING
from rwkv_cli.terminal.wrap import Wrapped

_KEYS = "Ctrl-C ends an answer, Ctrl-D leaves, Alt-Enter begins a new line; a line that begins with // is text."
_SETTINGS = {name: setting.kind for name, setting in SAMPLING.items()} | {"max_tokens": MAX_TOKENS}
"""The names that /set takes, and their values."""


class Repl:
    """One chat at a terminal or in a pipe."""

    def __init__(self, conversation: Conversation, session: Session | None = None) -> None:
        self.talk, self.session = conversation, session
        self.terminal = is_terminal()
        self.read_tokens = self.made_tokens = 0
        self.read_seconds = self.made_seconds = 0.0
        self.edited = ""
        """The last turn's text, while it is being changed."""
        self.over = False
        nothing: Callable[[], Iterable[str]] = tuple
        self.commands: dict[str, tuple[str, str, Callable[[str], None], Callable[[], Iterable[str]]]] = {
            "/undo": ("", "take the last turn back", self.undo, nothing),
            "/retry": ("", "another answer to the last turn", self.retry, nothing),
            "/edit": ("[TEXT]", "change the last turn and answer it anew", self.edit, nothing),
            "/reset": ("", "forget the conversation", self.reset, nothing),
            "/system": ("[TEXT|off]", "show the system text, or begin anew with another", self.system, nothing),
            "/think": ("[MODE]", "show or set how long the model reasons", self.think, lambda: THINK),
            "/set": ("NAME VALUE", "change a setting from the next answer on", self.set, lambda: _SETTINGS),
            "/params": ("", "the settings", self.params, nothing),
            "/history": ("", "all that was said", self.history, nothing),
            "/save": (
                "NAME",
                "keep the conversation as a session; without one, go on in it",
                self.save,
                sessions.names,
            ),
            "/load": ("NAME", "go on with a session", self.load, sessions.names),
            "/fork": ("NAME", "go on in a new session, the old one stays as it is", self.fork, nothing),
            "/stats": ("", "tokens, speed and memory so far", self.stats, nothing),
            "/copy": ("FILE", "write the conversation as Markdown", self.copy, nothing),
            "/help": ("", "this list", self.help, nothing),
            "/exit": ("", "leave", self.exit, nothing),
        }

    def run(self) -> None:
        """Read turns and answer them until the input ends."""
        read = reader({name: command[3] for name, command in self.commands.items()})
        if self.terminal:
            config = self.talk.model.config
            note(f"{self.talk.model.path.name} · RWKV-{config.version} · /help lists commands", faint=True)
            self._resumed()
        while not self.over:
            editing, self.edited = self.edited, ""
            try:
                line = read(editing).strip()
                if line.startswith("/") and not line.startswith("//"):
                    self._command(line)
                elif line:
                    self._say(self.talk.reply(_unescaped(line), again=bool(editing)))
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                note("The turn stays as it was." if editing else "/exit or Ctrl-D leaves", faint=True)
            except (ConversationError, SessionError, TokenizerError) as error:
                note(str(error))

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            near = difflib.get_close_matches(name, self.commands, 1)
            note(f"{name} is not a command; " + (f"did you mean {near[0]}?" if near else "/help lists them"))
            return
        usage, _, run, _ = self.commands[name]
        if bool(rest.strip()) < (usage != "" and not usage.startswith("[")) or (rest.strip() and not usage):
            note(f"it is {name} {usage}".strip())
            return
        try:
            run(rest.strip())
        except click.BadParameter as error:
            note(error.message)
        except OSError as error:
            note(f"{error.filename}: {error.strerror}" if error.filename else str(error))

    def _say(self, reply: Reply) -> None:
        done, thought = reply.completion, False
        show = Wrapped().write if self.terminal else write
        with _on_interrupt(lambda: setattr(done, "cancelled", True)), no_echo():
            with reading_bar(len(reply.prompt)) as done.on_read:
                for thinking, piece in reply:
                    if thinking and not self.terminal:
                        continue
                    if thought and not thinking:
                        show("\n\n")
                    thought = thinking
                    show(piece, faint=thinking)
            self._figures(reply)
            self._keep()
        if done.cancelled and not self.terminal:
            raise KeyboardInterrupt

    def _figures(self, reply: Reply) -> None:
        """Count what was read and made, and show it."""
        done = reply.completion
        click.echo("\n" if self.terminal else "")
        self.read_tokens += done.prompt_tokens
        self.read_seconds += done.prompt_seconds
        self.made_tokens += done.tokens
        self.made_seconds += done.seconds
        if self.terminal:
            text = _figures(done.tokens, done.seconds, done.prompt_tokens, done.prompt_seconds, done.stop)
            note(text + "\n", faint=True)

    def _keep(self) -> None:
        """Save the session, if there is one. A chat goes on even where that fails."""
        if self.session is not None:
            try:
                self.session.save(self.talk)
            except (OSError, SessionError) as error:
                note(f"not saved: {error}")

    def _resumed(self) -> None:
        """Where a resumed conversation was."""
        if self.session is not None and self.talk.turns:
            last = self.talk.turns[-1]
            note(f"session {self.session.name}, {len(self.talk.turns)} turns; the last one:", faint=True)
            note(f"> {last.user}\n{last.shown()}\n", faint=True)

    def undo(self, _rest: str) -> None:
        turn = self.talk.undo()
        note(f"Taken back: {_short(turn.user)}")
        self._keep()

    def retry(self, _rest: str) -> None:
        self._say(self.talk.retry())

    def edit(self, rest: str) -> None:
        if not rest and not self.terminal:
            raise ConversationError("/edit TEXT: give the turn's new text")
        if rest:
            self._say(self.talk.reply(_unescaped(rest), again=True))
        else:
            user = self.talk.last().user
            self.edited = "/" + user if user.startswith("/") else user

    def reset(self, _rest: str) -> None:
        self.talk.reset()
        note("The conversation is forgotten.")
        self._keep()

    def system(self, rest: str) -> None:
        if rest:
            self.talk.system = "" if rest == "off" else rest
            self.reset("")
        else:
            note(self.talk.system or "no system text")

    def think(self, rest: str) -> None:
        if rest:
            self.talk.set_think(rest)
            self._keep()
        note(f"think {self.talk.think}")

    def set(self, rest: str) -> None:
        name, _, text = rest.replace("=", " ", 1).partition(" ")
        name = name.replace("-", "_")
        if name not in _SETTINGS or not text.strip():
            raise ConversationError(f"/set NAME VALUE, where NAME is one of {', '.join(_SETTINGS)}")
        value = _SETTINGS[name].convert(text.strip(), None, None)
        if name == "max_tokens":
            self.talk.max_tokens = value
        elif name == "seed":
            self.talk.set_seed(value)
        else:
            self.talk.settings = replace(self.talk.settings, **{name: value})
        self._keep()
        note(f"{name} {value}")

    def params(self, _rest: str) -> None:
        talk = self.talk
        rows: dict[str, Any] = asdict(talk.settings)
        rows |= {"seed": talk.sampler.seed, "max_tokens": talk.limit, "template": talk.template.name}
        note(columns(list((rows | {"think": talk.think, "system": talk.system or "none"}).items())))

    def history(self, _rest: str) -> None:
        for turn in self.talk.turns:
            write(f"> {turn.user}\n{turn.shown()}\n\n")

    def save(self, rest: str) -> None:
        saved = self._keep_as(rest)
        self.session = self.session or saved
        note(f"Saved as {rest}.")

    def fork(self, rest: str) -> None:
        self.session = self._keep_as(rest)
        note(f"This is session {rest} now.")

    def _keep_as(self, name: str) -> Session:
        if sessions.exists(name) and not (self.session and self.session.name == name):
            raise SessionError(f"session {name} exists; choose another name, or remove it: rwkv sessions rm {name}")
        session = self.session if self.session and self.session.name == name else Session(name)
        session.save(self.talk)
        return session

    def load(self, rest: str) -> None:
        if self.session is None and self.talk.turns:
            raise ConversationError("this conversation is not kept yet: /save NAME it, or /reset it first")
        self.session, self.talk = Session.resume(rest, self.talk.model)
        note(f"This is session {rest} now, {len(self.talk.turns)} turns.")
        if self.terminal:
            self._resumed()

    def stats(self, _rest: str) -> None:
        size = sum(array.nbytes for array in self.talk.now.state.arrays().values())
        kept = sum(turn.before is not None for turn in self.talk.turns)
        note(columns([
            ("turns", len(self.talk.turns)),
            ("this run", _figures(self.made_tokens, self.made_seconds, self.read_tokens, self.read_seconds)),
            ("state", f"{size / 1e6:.1f} MB, whatever the length; {kept} kept for /undo"),
            ("session", self.session.name if self.session else "none; /save NAME keeps this conversation"),
        ]))  # fmt: skip

    def copy(self, rest: str) -> None:
        path = Path(rest).expanduser()
        if path.exists():
            raise ConversationError(f"{path} exists; name another file")
        with replacing(path) as out:
            out.write(markdown(self.talk.model.path.name, self.talk.turns).encode("utf-8", "replace"))
        note(f"Wrote {path}")

    def help(self, _rest: str) -> None:
        rows = [(f"{name} {usage}".strip(), text) for name, (usage, text, _, _) in self.commands.items()]
        note(columns(rows) + "\n" + _KEYS)

    def exit(self, _rest: str) -> None:
        self.over = True


def _unescaped(line: str) -> str:
    """A line that is text; one that begins with a slash is typed with two."""
    return line[1:] if line.startswith("//") else line


def _short(text: str) -> str:
    line = text.split("\n", 1)[0]
    return line if line == text and len(line) <= 60 else line[:60] + " …"


def _figures(tokens: int, seconds: float, read: int, read_seconds: float, stop: str = "") -> str:
    """How much was made and read, and how fast; and why an answer ended, if not by itself."""
    made = f"{tokens} tokens" + (f", {tokens / seconds:.1f} tok/s" if seconds else "")
    taken = f"prompt {read} tokens" + (f", {read / read_seconds:.0f} tok/s" if read_seconds else "")
    ended = {"length": " · cut short: /set max_tokens N allows more", "interrupted": " · interrupted"}
    return f"{made} · {taken}{ended.get(stop, '')}"


@contextmanager
def _on_interrupt(react: Any) -> Iterator[None]:
    """Ctrl-C calls `react` instead of raising, so that no kernel is ever torn out of a token."""
    before = signal.signal(signal.SIGINT, lambda *_: react())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
