"""The command `rwkv`. It loads a command only when that is called, and words every expected error."""

import difflib
import importlib
import io
import os
import sys
from typing import Any

import click

from rwkv_cli import __version__
from rwkv_cli.commands.configured import read_defaults, worded
from rwkv_cli.errors import RwkvError
from rwkv_cli.terminal.output import one_line

COMMANDS = {
    "convert": "Convert a released checkpoint to a quantized file.",
    "pull": "Download a checkpoint and convert it.",
    "generate": "Continue a text.",
    "chat": "Talk with a model.",
    "serve": "Serve models to other programs (OpenAI's interface).",
    "prompt": "Show what a model reads of a chat.",
    "tokenize": "Show the tokens of a text.",
    "models": "List the models that have a name, and remove some.",
    "sessions": "List, show and remove kept chats.",
    "ppl": "Measure perplexity on text files.",
    "eval": "Measure what a model can do.",
    "config": "Show what options are in force, and where they come from.",
    "info": "Show what a converted file holds.",
    "bench": "Measure speed.",
}


_ELSEWHERE = {
    "run": "chat",
    "list": "models",
    "server": "serve",
    "show": "info",
    "create": "convert",
    "download": "pull",
    "quantize": "convert",
    "completion": "generate",
    "perplexity": "ppl",
    "evaluate": "eval",
}
"""Names that other programs have for these commands."""

_LEAST_MEMORY = 400 << 20
"""Bytes of addresses that the libraries take which a command loads, without a model."""


class _Commands(click.Group):
    """The group of all commands, each loaded when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - the library's interface
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"rwkv_cli.commands.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Name the nearest command where there is none of this name."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], [*COMMANDS, *_ELSEWHERE], 1)
            hint = f" Did you mean {_ELSEWHERE.get(near[0], near[0])!r}?" if near else ""
            raise click.UsageError(error.message + hint, ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Word every expected error, without what could steer the terminal."""
        if 0 < _limit() < _LEAST_MEMORY:  # libraries would fail in words of their own
            raise click.ClickException(_expected(MemoryError()) or "")
        try:
            return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:  # its message is a help text of many lines
            raise
        except click.UsageError as error:
            if (sentence := worded(error)) is not None:
                raise click.ClickException(_short(sentence)) from None
            raise click.UsageError(_short(error.format_message()), error.ctx) from None
        except click.ClickException as error:
            raise click.ClickException(_short(error.message)) from None
        except (OSError, ValueError, MemoryError, ImportError, RuntimeError) as error:
            message = _expected(error)
            if message is None:
                raise
            raise click.ClickException(_short(message)) from None


def _short(message: str) -> str:
    """Return a message on one line, without the middle of one that names something enormous."""
    message = one_line(message)
    return message if len(message) <= 2000 else f"{message[:1000]} … {message[-500:]}"


def _expected(error: Exception) -> str | None:
    """Return the sentence for an error that a user can cause, or None for a bug, whose traceback is wanted."""
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, RwkvError):
        return str(error)
    if _short_of_memory(error):
        detail = f" ({error})" if isinstance(error, MemoryError) and str(error) else ""
        limit = _limit()
        advice = (
            f"this shell allows {limit >> 20} MB: raise its limit with `ulimit -v`" if limit else "close other programs"
        )
        return f"out of memory{detail}; {advice} or take a smaller model"
    if isinstance(error, OSError) and error.errno is not None:
        name = f"{error.filename}: " if error.filename is not None else ""
        return f"{name}{error.strerror}"
    return str(error) if isinstance(error, OSError) else None


def _limit() -> int:
    """Return the bytes of addresses that this process may use (`ulimit -v`), or 0 if there is no limit."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return 0 if limit == resource.RLIM_INFINITY else limit


def _short_of_memory(error: Exception) -> bool:
    """Return whether memory is what lacks: libraries and threads that cannot be loaded say it in other words."""
    signs = ["failed to map segment", "annot allocate memory", "start new thread"]
    signs += ["load shared object file"] if _limit() else []
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="rwkv")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run RWKV language models on this machine, quantized to int8. A small storyteller is bundled to try with.

    \b
    rwkv chat                                   with the storyteller
    rwkv convert RWKV-x070-World-0.1B.pth       once: .pth to .safetensors
    rwkv chat -m RWKV-x070-World-0.1B.int8.safetensors
    """
    ctx.default_map = read_defaults(ctx)


def main() -> None:
    """Run the command line."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the caller has closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            # Bytes that are no text, and characters that the terminal lacks, are no reason to stop.
            stream.reconfigure(errors="replace")
    try:
        cli()
    except OSError as error:  # the help texts could not be written
        click.echo(f"Error: {_short(_expected(error) or str(error))}", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left goes nowhere when Python ends
        sys.exit(1)
