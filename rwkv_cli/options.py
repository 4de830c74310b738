"""Options that commands share, and opening the model they name."""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rwkv_cli.engine import LanguageModel

Command = Callable[..., Any]


def model_options(command: Command) -> Command:
    """-m, --threads and --device; the command gets them as `model: Path`, `threads` and `device`."""

    @click.option(
        "-m",
        "--model",
        type=click.Path(path_type=Path),
        metavar="MODEL",
        help="Converted model (.safetensors); default: $RWKV_MODEL.",
    )
    @click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads; default: all cores.")
    @click.option(
        "--device",
        type=click.Choice(["cpu", "cuda", "auto"]),
        default="cpu",
        show_default=True,
        help="Where to run.",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, model: Path | None, **kwargs: Any) -> Any:
        return command(*args, model=_named(model), **kwargs)

    return wrapped  # fmt: skip


def _finite(_ctx: click.Context, _param: click.Parameter, value: float | None) -> float | None:
    """nan passes every range, since it compares with no border."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number")
    return value


def sampling_options(command: Command) -> Command:
    """The sampler's settings; an option that is not given arrives as None."""
    options = [
        click.option("--temperature", type=click.FloatRange(min=0), callback=_finite, metavar="T",
                     help="Spread of the choice; 0 always takes the likeliest token."),
        click.option("--top-p", type=click.FloatRange(0, 1), callback=_finite, metavar="P",
                     help="Keep the likeliest tokens that make up this probability."),
        click.option("--top-k", type=click.IntRange(min=0), metavar="K", help="Keep the K likeliest tokens; 0: all."),
        click.option("--min-p", type=click.FloatRange(0, 1), callback=_finite, metavar="P",
                     help="Drop tokens less likely than P times the likeliest."),
        click.option("--presence-penalty", type=click.FloatRange(-100, 100), callback=_finite, metavar="A",
                     help="Taken off the logit of a token that has occurred."),
        click.option("--frequency-penalty", type=click.FloatRange(-100, 100), callback=_finite, metavar="A",
                     help="Taken off for each time that it has occurred."),
        click.option("--penalty-decay", type=click.FloatRange(0, 1), callback=_finite, metavar="D",
                     help="What a past occurrence keeps of its weight with each new token."),
        click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Same seed, same text; default: random."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _named(model: Path | None) -> Path:
    if model is None:
        text = os.environ.get("RWKV_MODEL", "")
        if not text:
            raise click.UsageError("no model: give one with -m MODEL, or set RWKV_MODEL to its path")
        model = Path(text)
    return model


def open_model(path: Path, device: str, threads: int | None) -> "LanguageModel":
    """Load the model; refuse one without a tokenizer. Kernel compilation is announced on stderr."""
    from rwkv_cli.engine import LanguageModel

    announce_compilation()
    model = LanguageModel.load(path, device, threads)
    if model.tokenizer is None:
        raise click.ClickException(
            f"{path}: has no tokenizer, so it cannot read text; convert it again with --tokenizer PATH"
        )
    return model


@functools.cache
def announce_compilation() -> None:
    """Say so, once, if kernels have to be compiled."""
    from rwkv_cli.kernels.jit import on_first_compilation

    on_first_compilation(lambda: click.echo("Compiling kernels for this CPU (only the first time) …", err=True))
