"""rwkv chat"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_cli.options import model_options, open_model, sampling_options
from rwkv_cli.terminal import note, write

if TYPE_CHECKING:
    from rwkv_cli.engine import Completion, LanguageModel
    from rwkv_cli.sampling import Sampling
    from rwkv_cli.templates import Template

HELP = """/reset  forget the conversation
/help   this list
/exit   leave (also Ctrl-D)
Ctrl-C  end the answer"""


@click.command("chat")
@model_options
@click.option(
    "--template",
    type=click.Choice(["world", "g1", "raven", "qa", "plain"]),
    help="How turns are written; default: what conversion found.",
)
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    metavar="N",
    help="End an answer after N tokens.",
)
@sampling_options
def command(
    model: Path, threads: int | None, device: str, template: str | None, max_tokens: int, **options: Any
) -> None:
    """Talk with a model, turn by turn. It remembers the conversation; Ctrl-C ends an answer, /help lists commands.

    Reads turns from standard input a line at a time, so it works in a pipe too. Sampling defaults are those the
    template's authors use.

    \b
    rwkv chat -m RWKV-x070-World-0.1B.int8.safetensors
    """  # fmt: skip
    from rwkv_cli.templates import TEMPLATES

    lm = open_model(model, device, threads)
    name = template or lm.template
    if name not in TEMPLATES:
        raise click.ClickException(f"{model}: its chat template {name!r} is unknown; choose one with --template")
    seed = options.pop("seed")
    chosen = TEMPLATES[name]
    settings = replace(chosen.sampling, **{key: value for key, value in options.items() if value is not None})
    Conversation(lm, chosen, settings, seed, max_tokens).converse()


class Conversation:
    """A chat: the state that has read it, and what that state has still to read."""

    def __init__(
        self, model: LanguageModel, template: Template, settings: Sampling, seed: int | None, max_tokens: int
    ) -> None:
        self.model, self.template, self.settings, self.max_tokens = model, template, settings, max_tokens
        self.seed = seed
        self.reset()

    def reset(self) -> None:
        """Back to before the first turn."""
        from rwkv_cli.engine import new_sampler

        self.state = self.model.new_state()
        self.unread = self.template.opening
        self.sampler = new_sampler(self.model, self.settings, self.seed)

    def completion(self) -> Completion:
        """The model's next answer, to be run by `listen`."""
        from rwkv_cli.engine import Completion

        self.sampler.forget()  # penalties are for repetition within an answer
        return Completion(self.model, self.state, self.sampler, self.max_tokens, self.template.stops)

    def listen(self, completion: Completion, text: str) -> Iterator[str]:
        """The answer's pieces, without the blank it starts with; then the conversation has moved on."""
        before = completion.state.clone()
        prompt = self.model.text_tokenizer.encode(self.unread + self.template.prompt(text))
        started = False
        for piece in completion.run(prompt):
            shown = piece if started else piece.lstrip()
            started = started or bool(shown)
            if shown:
                yield shown
        if completion.prompt_tokens < len(prompt):
            self.state = before  # interrupted before the turn was read: it never happened
        else:
            self.state, self.unread = completion.state, completion.unread + self.template.end

    def converse(self) -> None:
        """Read turns and answer them until the input ends."""
        terminal = sys.stdin.isatty()
        if terminal:
            with suppress(ImportError):  # not on Windows
                import readline  # noqa: F401 - gives input() line editing and history

            note(f"{self.model.path.name} · RWKV-{self.model.config.version} · /help lists commands")
        while True:
            try:
                line = input("\x01\x1b[1m\x02> \x01\x1b[0m\x02" if terminal and sys.stdout.isatty() else "")
            except EOFError:
                if terminal:
                    note("")
                return
            except KeyboardInterrupt:
                note("\n(/exit or Ctrl-D leaves)")
                continue
            text = line.strip()
            if text == "/exit":
                return
            if text == "/reset":
                self.reset()
                note("The conversation is forgotten.")
            elif text.startswith("/"):
                note(HELP if text == "/help" else f"{text} is not a command.\n{HELP}")
            elif text:
                self._say(text)

    def _say(self, text: str) -> None:
        completion = self.completion()
        with _on_interrupt(lambda: setattr(completion, "cancelled", True)):
            for piece in self.listen(completion, text):
                write(piece)
        click.echo("\n" if sys.stdout.isatty() else "")


@contextmanager
def _on_interrupt(react: Any) -> Iterator[None]:
    """Ctrl-C calls `react` instead of raising, so that no kernel is ever torn out of a token."""
    before = signal.signal(signal.SIGINT, lambda *_: react())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
