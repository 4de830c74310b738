"""The chat program. It reads turns and commands, shows answers as they come, and keeps the session."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from rwkv_cli.engine import sessions
from rwkv_cli.engine.completion import Result
from rwkv_cli.engine.conversation import Conversation, Reply, markdown
from rwkv_cli.engine.sessions import Session
from rwkv_cli.errors import ConversationError, RwkvError, SessionError, TokenizerError, pasted, reason
from rwkv_cli.quant import replacing
from rwkv_cli.terminal.output import columns, counted, note, one_line, reading_bar
from rwkv_cli.terminal.reader import is_terminal, no_echo, on_interrupt, reader
from rwkv_cli.terminal.settings import MAX_TOKENS, SAMPLING
from rwkv_cli.terminal.slash import ALIASES, Command, figures, not_known, short, unescaped
from rwkv_cli.terminal.wrap import answer_writer

_KEYS = "Ctrl-C ends an answer, Ctrl-D leaves, Alt-Enter begins a new line; a line that begins with // is text."
_SETTINGS = {name: setting.kind for name, setting in SAMPLING.items()} | {"max_tokens": MAX_TOKENS}
"""The names that /set takes, and their values."""


_HOW_TO_KEEP = "/save NAME before leaving keeps a chat under a name; rwkv chat --last goes on with this one."


class Repl:
    """One chat at a terminal or in a pipe."""

    def __init__(self, conversation: Conversation, session: Session | None = None) -> None:
        """`session` keeps the conversation. Without one, or with the one called LAST, the chat has no name."""
        self.talk = conversation
        named = session is not None and session.name != sessions.LAST
        self.session = session if named else None
        self.unnamed = session if session and not named else Session(sessions.LAST)
        """The session for a conversation without a name."""
        self.left: tuple[Conversation, Session | None] | None = None
        """The conversation before the last reset, and its session."""
        self.terminal = is_terminal()
        self.total = Result()
        """The figures of all answers so far."""
        self.edited = ""
        """The last turn's text, while the person changes it."""
        self.over = False
        self.unsaved = False
        """True while what was said is not on disk, though it should be."""
        keep_as = "keep the conversation under this name; a chat without one goes on under it"
        self.commands = {
            "/undo": Command("", "take the last turn back", self.undo),
            "/retry": Command("", "another answer to the last turn", self.retry),
            "/edit": Command("[TEXT]", "change the last turn and answer it anew", self.edit),
            "/reset": Command("", "begin anew; /undo takes it back", self.reset),
            "/system": Command("[TEXT|off]", "show the system text, or begin anew with another", self.system),
            "/think": Command(
                "[MODE]", "show or set how long the model reasons", self.think, lambda: self.talk.template.modes
            ),
            "/set": Command(
                "[NAME [VALUE]]", "show settings, or change one from the next answer on", self.set, lambda: _SETTINGS
            ),
            "/params": Command("", "show the settings", self.params),
            "/history": Command("", "show all that was said", self.history),
            "/save": Command("NAME", keep_as, self.save, sessions.names),
            "/load": Command("NAME", "go on with a session", self.load, sessions.names),
            "/fork": Command("NAME", "go on in a new session, the old one stays as it is", self.fork),
            "/stats": Command("", "tokens, speed and memory so far", self.stats),
            "/copy": Command("FILE", "write the conversation as Markdown", self.copy),
            "/help": Command("[COMMAND]", "this list", self.help, lambda: self.commands),
            "/exit": Command("", "leave", self.exit),
        }

    def converse(self) -> None:
        """Read turns and answer them until the input ends."""
        try:
            self._converse()
        finally:
            if self._nameless():
                note(_HOW_TO_KEEP, faint=True)

    def ask(self, text: str) -> None:
        """Answer one turn."""
        self._say(self.talk.reply(text))

    def _converse(self) -> None:
        """Read turns and answer them until the input ends."""
        read = reader({name: command.words for name, command in self.commands.items()})
        if self.terminal:
            config = self.talk.model.config
            note(f"{one_line(self.talk.model.path.name)} · RWKV-{config.version} · /help lists commands", faint=True)
            self._resumed()
        while not self.over:
            editing, self.edited = self.edited, ""
            try:
                line = read(editing).strip()
                if self.terminal and line in ("exit", "quit"):
                    line = "/exit"
                if line.startswith("/") and not line.startswith("//"):
                    self._obey(line)
                elif line:
                    self._say(self.talk.reply(unescaped(line), again=bool(editing)))
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                note("The turn stays as it was." if editing else "/exit or Ctrl-D leaves", faint=True)
            except (ConversationError, SessionError, TokenizerError) as error:
                note(str(error))

    def _obey(self, line: str) -> None:
        """Do what a command line says, or say what is wrong with it."""
        name, _, rest = line.partition(" ")
        name = ALIASES.get(name, name)
        if name not in self.commands:
            note(not_known(name, self.commands))
            return
        command = self.commands[name]
        if not command.takes(rest.strip()):
            note(f"type it as {name} {command.usage}".strip())
            return
        try:
            command.act(rest.strip())
        except OSError as error:
            note(reason(error))

    def _say(self, reply: Reply) -> None:
        """Show an answer as it comes. Ctrl-C ends the answer."""
        completion, thought = reply.completion, False
        show = answer_writer()
        with on_interrupt(completion.cancel), no_echo():
            with reading_bar(len(completion.request.prompt)) as on_read:
                for thinking, piece in reply.stream(on_read):
                    if thinking and not self.terminal:
                        continue
                    if thought and not thinking:
                        show("\n\n")
                    thought = thinking
                    show(piece, faint=thinking)
            self._count(completion.result, "" if reply.happened() else "; the conversation is as it was")
            self._keep()
        if completion.cancelled and not self.terminal:
            raise KeyboardInterrupt

    def _count(self, result: Result, outcome: str) -> None:
        """Add an answer's figures to those of this run, and show them with what an interruption came to."""
        click.echo("\n" if self.terminal else "")
        self.total.prompt_tokens += result.prompt_tokens
        self.total.prompt_seconds += result.prompt_seconds
        self.total.tokens += result.tokens
        self.total.seconds += result.seconds
        self.total.drafted += result.drafted
        self.total.accepted += result.accepted
        if self.terminal:
            ended = {"length": " · cut short: /set max_tokens N allows more", "interrupted": f" · interrupted{outcome}"}
            note(f"{figures(result)}{ended.get(result.stop, '')}\n", faint=True)

    def _nameless(self) -> bool:
        """Return whether more than one turn was said at a terminal in a chat without a name."""
        return self.terminal and self.session is None and len(self.talk.turns) > 1

    def _keep(self) -> None:
        """Save the conversation where something was said. The chat goes on even where that fails."""
        try:
            if self.session is not None and self.talk.turns:
                self._keep_in(self.session)
            elif self._nameless():
                self.unnamed.keep_last(self.talk)
            self.unsaved = False
        except (OSError, RwkvError) as error:
            self.unsaved = True
            what = f"session {self.session.name}" if self.session else "the chat"
            note(f"{what} was not saved: {reason(error) if isinstance(error, OSError) else error}")

    def _keep_in(self, session: Session) -> None:
        """Save the conversation under a name, or under a free one where another chat has changed what is there."""
        try:
            session.save(self.talk)
        except SessionError:
            other = Session(sessions.next_name(session.name))
            other.save(self.talk)
            self.session = other
            note(f"Another chat has changed session {session.name}. This chat is kept as {other.name}.")

    def _recall(self) -> None:
        """Read what was said before the last turn, where its state is no longer kept. Ctrl-C ends that."""
        interrupted = False

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True

        @contextmanager
        def bar(tokens: int) -> Iterator[Callable[[int], None]]:
            note("The conversation is read once more.", faint=True)
            with reading_bar(tokens) as show:

                def on_read(read: int) -> None:
                    if interrupted:
                        raise KeyboardInterrupt
                    show(read)

                yield on_read

        with on_interrupt(interrupt):
            self.talk.recall(bar)

    def _resumed(self) -> None:
        """Show how far a resumed conversation had come."""
        if self.talk.turns:
            last = self.talk.turns[-1]
            name = f"session {self.session.name}" if self.session else "the last chat"
            note(f"{name}, {counted(len(self.talk.turns), 'turn')}; the last one:", faint=True)
            note(f"> {last.user}\n{last.shown()}\n", faint=True)

    def undo(self, _rest: str) -> None:
        """Take the last turn back, or the reset that came after all turns."""
        if self.left and not self.talk.turns:
            (self.talk, self.session), self.left = self.left, None
            note(f"Taken back: the new beginning. The chat has {counted(len(self.talk.turns), 'turn')} again.")
            return
        self._recall()
        turn = self.talk.undo()
        note(f"Taken back: {short(turn.user)}")
        self._keep()

    def retry(self, _rest: str) -> None:
        """Answer the last turn once more."""
        self._recall()
        self._say(self.talk.retry())

    def edit(self, rest: str) -> None:
        """Answer the last turn anew, with the text given here or typed next."""
        if not rest and not self.terminal:
            raise ConversationError("/edit TEXT: give the turn's new text")
        self._recall()
        if rest:
            self._say(self.talk.reply(unescaped(rest), again=True))
        else:
            user = self.talk.last().user
            self.edited = "/" + user if user.startswith("/") else user

    def reset(self, _rest: str) -> None:
        """Begin anew. What a session keeps stays as it is."""
        self._begin_anew(self.talk.system)

    def _begin_anew(self, system: str) -> None:
        """Leave the conversation for a new one. /undo goes back to it."""
        said, kept = bool(self.talk.turns), ""
        if said:
            self.left = self.talk, self.session
        self.talk = self.talk.anew(system)
        if said and self.session is not None:
            old, self.session = self.session.name, Session(sessions.next_name(self.session.name))
            kept = f" Session {old} stays as it is; what you say now is kept as {self.session.name}."
        self.unnamed = Session(sessions.LAST)
        note(f"This is a new conversation.{kept}" + (" /undo takes that back." if said else ""))

    def system(self, rest: str) -> None:
        """Show the system text, or begin anew with another."""
        if rest:
            self._begin_anew("" if rest == "off" else rest)
        else:
            note(self.talk.system or "no system text")

    def think(self, rest: str) -> None:
        """Show or set how long the model reasons."""
        if rest:
            self.talk.set_think(rest)
            self._keep()
        note(f"think {self.talk.think}")

    def set(self, rest: str) -> None:
        """Show the settings, or change one from the next answer on."""
        if not rest:
            self.params(rest)
            return
        name, _, text = rest.replace("=", " ", 1).partition(" ")
        name = name.replace("-", "_")
        if name not in _SETTINGS:
            raise ConversationError(f"/set NAME VALUE, where NAME is one of {', '.join(_SETTINGS)}")
        if not text.strip():
            note(f"{name} {self._settings()[name]}")
            return
        try:
            value = _SETTINGS[name].convert(text.strip(), None, None)
        except click.BadParameter as error:
            raise ConversationError(f"{name}: {error.message}") from None
        if name == "max_tokens":
            self.talk.max_tokens = value
        elif name == "seed":
            self.talk.set_seed(value)
        else:
            self.talk.settings = self.talk.settings.changed(**{name: value})
        self._keep()
        note(f"{name} {value}")

    def params(self, _rest: str) -> None:
        """Show the settings."""
        talk = self.talk
        others = {"template": talk.template.name, "think": talk.think, "system": talk.system or "none"}
        others |= {"style": talk.template.style} if talk.template.style else {}
        note(columns(list((self._settings() | others).items())))

    def _settings(self) -> dict[str, Any]:
        """Return what /set can change."""
        return asdict(self.talk.settings) | {"seed": self.talk.sampler.seed, "max_tokens": self.talk.limit}

    def history(self, _rest: str) -> None:
        """Print everything said so far."""
        show = answer_writer()
        for turn in self.talk.turns:
            show(f"> {turn.user}\n{turn.shown()}\n\n")

    def save(self, rest: str) -> None:
        """Keep the conversation as a session. A chat without a session goes on in it."""
        saved = self._keep_as(rest)
        self.session = self.session or saved
        note(f"Saved as {rest}.")

    def fork(self, rest: str) -> None:
        """Go on in a new session."""
        self.session = self._keep_as(rest)
        note(f"This is session {rest} now.")

    def _keep_as(self, name: str) -> Session:
        """Save the conversation under a name that is free or this session's own."""
        if sessions.exists(name) and not (self.session and self.session.name == name):
            remove = pasted("rwkv", "sessions", "rm", name)
            raise SessionError(f"session {name} exists; choose another name, or remove it: {remove}")
        session = self.session if self.session and self.session.name == name else Session(name)
        session.save(self.talk)
        return session

    def load(self, rest: str) -> None:
        """Go on with a session."""
        if self.session is None and self.talk.turns:
            raise ConversationError("this conversation is not kept yet: /save NAME it, or /reset it first")
        speculation = self.talk.speculation
        self.session, self.talk = Session.resume(rest, self.talk.model)
        self.talk.speculation = speculation
        self.left = None
        if self.terminal and self.talk.turns:
            self._resumed()
        else:
            note(f"This is session {rest} now, {counted(len(self.talk.turns), 'turn')}.")

    def stats(self, _rest: str) -> None:
        """Show tokens, speed and memory so far."""
        size = sum(array.nbytes for array in self.talk.now.state.arrays().values())
        kept = sum(turn.before is not None for turn in self.talk.turns)
        rows: list[tuple[str, object]] = [
            ("turns", len(self.talk.turns)),
            ("this run", figures(self.total)),
            ("state", f"{size / 1e6:.1f} MB, whatever the length; {kept} kept for /undo"),
            ("session", self.session.name if self.session else "none; /save NAME keeps this conversation"),
        ]
        note(columns(rows))

    def copy(self, rest: str) -> None:
        """Write the conversation into a file as Markdown."""
        try:
            path = Path(rest.replace("\0", "")).expanduser()
        except RuntimeError:
            raise ConversationError(f"{rest}: there is no such user; name another file") from None
        if path.exists():
            raise ConversationError(f"{path} exists; name another file")
        with replacing(path) as out:
            out.write(markdown(self.talk.model.path.name, self.talk.turns).encode("utf-8", "replace"))
        note(f"Wrote {one_line(path)}")

    def help(self, rest: str) -> None:
        """List the commands, or say what one does."""
        wanted = "/" + rest.removeprefix("/") if rest else ""
        wanted = ALIASES.get(wanted, wanted)
        if wanted and wanted not in self.commands:
            raise ConversationError(not_known(wanted, self.commands))
        chosen = {wanted: self.commands[wanted]} if wanted else self.commands
        rows = [(f"{name} {command.usage}".strip(), command.help) for name, command in chosen.items()]
        note(columns(rows) + ("" if wanted else "\n" + _KEYS))

    def exit(self, _rest: str) -> None:
        """End the chat after this line."""
        self.over = True
