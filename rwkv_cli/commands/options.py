"""Options that commands share, and opening the model they name."""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rwkv_cli.engine.model import LanguageModel

Command = Callable[..., Any]


def model_options(command: Command) -> Command:
    """-m, --threads and --device; the command gets them as `model: Path | None`, `threads` and `device`."""
    options = [
        click.option("-m", "--model", type=click.Path(path_type=Path), metavar="MODEL",
                     help="Converted model (.safetensors); default: $RWKV_MODEL, else the bundled storyteller."),
        click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads; default: one a core."),
        click.option("--device", type=click.Choice(["cpu", "cuda", "auto"]), default="cpu", show_default=True,
                     help="Where to run."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


class _Finite(click.FloatRange):
    """A range that nan, which compares with no border, does not pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number


SAMPLING: dict[str, tuple[click.ParamType[Any], str, str]] = {
    "temperature": (_Finite(min=0), "T", "Spread of the choice; 0 always takes the likeliest token."),
    "top_p": (_Finite(0, 1), "P", "Keep the likeliest tokens that make up this probability."),
    "top_k": (click.IntRange(min=0), "K", "Keep the K likeliest tokens; 0: all."),
    "min_p": (_Finite(0, 1), "P", "Drop tokens less likely than P times the likeliest."),
    "presence_penalty": (_Finite(-100, 100), "A", "Taken off the logit of a token that has occurred."),
    "frequency_penalty": (_Finite(-100, 100), "A", "Taken off for each time that it has occurred."),
    "penalty_decay": (_Finite(0, 1), "D", "What a past occurrence keeps of its weight with each new token."),
    "seed": (click.IntRange(min=0), "N", "Same seed, same text; default: random."),
}
"""The sampler's settings: type, metavar and help."""


def sampling_options(command: Command) -> Command:
    """The sampler's settings; an option that is not given arrives as None."""
    for name, (kind, metavar, text) in reversed(SAMPLING.items()):
        command = click.option("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=text)(command)
    return command


def state_option(command: Command) -> Command:
    """--state, for `models.tuned.read_tuned_state`; the command gets it as `state: Path | None`."""
    return click.option("--state", type=click.Path(path_type=Path), metavar="FILE",
                        help="Start from a tuned initial state (.pth or .safetensors).")(command)  # fmt: skip


def named_model(path: Path | None) -> Path:
    """The model that is named here or by $RWKV_MODEL, else the bundled one, which is announced on stderr."""
    from rwkv_cli.terminal.converting import converting_bar
    from rwkv_cli.terminal.output import note

    named = os.environ.get("RWKV_MODEL")
    if path is not None or named:
        return path or Path(str(named))
    from rwkv_cli.engine.storyteller import storyteller

    announce_compilation()
    found = storyteller(converting_bar)
    note("No model named: this is the bundled storyteller. Name another with -m or $RWKV_MODEL.")
    return found


def open_model(path: Path | None, device: str, threads: int | None) -> "LanguageModel":
    """Load `named_model(path)`; refuse one without a tokenizer. Kernels are compiled here if they have to be."""
    from rwkv_cli.engine.model import LanguageModel
    from rwkv_cli.terminal.output import loading_bar, note

    announce_compilation()
    path = named_model(path)
    with loading_bar(path) as show:
        model = LanguageModel.load(path, device, threads, show)
    if device == "auto":
        note(f"Running on {model.backend.describe()}.")
    if model.tokenizer is None:
        raise click.ClickException(
            f"{path}: has no tokenizer, so it cannot read text; convert it again with --tokenizer PATH"
        )
    model.compile_kernels()
    return model


def complete_session(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Shell completion of a session's name."""
    from rwkv_cli.engine import sessions as session

    return [name for name in session.names() if name.startswith(incomplete)]


@functools.cache
def announce_compilation() -> None:
    """Say so, once, if kernels have to be compiled."""
    from rwkv_cli.kernels.cache import on_first_compilation

    on_first_compilation(lambda: click.echo("Compiling kernels for this machine (only the first time) …", err=True))
