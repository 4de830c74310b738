"""Options that commands share, and the opening of the model that they name."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_cli.terminal.compiling import announce_trouble, load_kernels
from rwkv_cli.terminal.output import loading_bar, note
from rwkv_cli.terminal.plot import SUFFIXES
from rwkv_cli.terminal.settings import SAMPLING, Whole

if TYPE_CHECKING:
    from rwkv_cli.engine.model import LanguageModel
    from rwkv_cli.models.base import Head

Command = Callable[..., Any]


def model_options(command: Command) -> Command:
    """Add -m, --threads and --device. The command gets `model: Path | None`, `threads` and `device`."""
    options = [
        click.option("-m", "--model", type=click.Path(path_type=Path), metavar="MODEL",
                     help="Converted model (.safetensors); default: $RWKV_MODEL, else the bundled storyteller."),
        click.option("--threads", type=Whole(min=1), metavar="N", help="CPU threads; default: one a core."),
        click.option("--device", type=click.Choice(["cpu", "cuda", "auto"]), default="cpu", show_default=True,
                     help="Where to run."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def sampling_options(command: Command) -> Command:
    """Add the sampler's settings and its seed. The command gets None for an option that is not given."""
    for name, setting in reversed(SAMPLING.items()):
        option = "--" + name.replace("_", "-")
        command = click.option(option, type=setting.kind, metavar=setting.metavar, help=setting.help)(command)
    return command


TEMPLATE_NAMES = ["world", "g1", "g1h", "raven", "qa", "plain"]
"""The templates that --template names."""


def template_options(command: Command) -> Command:
    """Add --template, --style and --think. The command gets None for an option that is not given."""
    options = [
        click.option("--template", type=click.Choice(TEMPLATE_NAMES),
                     help="How turns are written; default: what conversion found."),
        click.option("--style", type=click.Choice(["bot", "assistant", "function_calling"]),
                     help="The style of template g1h; default: bot."),
        click.option("--think", type=click.Choice(["off", "on", "short", "long", "fast"]),
                     help="How long a reasoning model (G1) thinks before it answers; default: on for such models."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def state_option(command: Command) -> Command:
    """Add --state, a file for `models.tuned.read_tuned_state`. The command gets `state: Path | None`."""
    text = "Start from a tuned initial state (.pth or .safetensors)."
    return click.option("--state", type=click.Path(path_type=Path), metavar="FILE", help=text)(command)


def plot_option(what: str) -> Callable[[Command], Command]:
    """Add --plot, refused before any work where it could not be drawn. The command gets `plot: Path | None`."""
    return click.option(
        "--plot",
        type=click.Path(path_type=Path, dir_okay=False),
        callback=_drawable,
        metavar="OUT",
        help=f"Draw {what}, into a .png, .svg or .pdf file.",
    )


def _drawable(_ctx: click.Context, _param: click.Parameter, path: Path | None) -> Path | None:
    """Check that a picture can be drawn into the file."""
    if path is None:
        return None
    if path.suffix.lower() not in SUFFIXES:
        raise click.BadParameter(f"{path} does not end in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise click.BadParameter(f"{path.parent} is not a folder; make it first, or name another file")
    try:
        import matplotlib  # noqa: F401 - the import only tells if it is there
    except ModuleNotFoundError:
        raise click.ClickException('--plot needs matplotlib; install it with: pip install "rwkv-cli[plot]"') from None
    return path


def named_model(path: Path | None) -> Path:
    """Return the model that is named here or by $RWKV_MODEL. Otherwise it is the bundled one, with a note on stderr."""
    from rwkv_cli.terminal.converting import converting_bar

    named = os.environ.get("RWKV_MODEL")
    if path is not None:
        return path
    if named:
        if not Path(named).exists():
            raise click.ClickException(
                f"{named}: there is no such model; $RWKV_MODEL names it, or give another with -m"
            )
        return Path(named)
    from rwkv_cli.engine.storyteller import storyteller

    announce_trouble()
    found = storyteller(converting_bar, load_kernels)
    note("No model named (-m or $RWKV_MODEL): this is the bundled storyteller.")
    return found


def open_model(path: Path | None, device: str, threads: int | None) -> "LanguageModel":
    """Load `named_model(path)`. A model without a tokenizer is refused."""
    from rwkv_cli.engine.model import LanguageModel
    from rwkv_cli.terminal.vanished import say_if_it_vanishes

    path = named_model(path)
    say_if_it_vanishes(path)
    with loading_bar(path) as show:
        model = LanguageModel.load(path, device, threads, show)
    if device == "auto":
        note(f"Running on {model.backend.describe()}.")
    if model.tokenizer is None:
        raise click.ClickException(
            f"{path}: has no tokenizer, so it cannot read text; convert it again with --tokenizer PATH"
        )
    return model


def check_there(*paths: Path | None) -> None:
    """Raise OSError for a path that is given and is not there, before anything is loaded for it."""
    for path in paths:
        if path is not None and str(path) != "-":
            path.stat()


def make_ready(model: "LanguageModel", *heads: "Head", text_bytes: int = 0) -> None:
    """Load the kernels of passes with these ends, with a counter where they have to be compiled, and make the passes.

    Those that a text of so many bytes needs are loaded with them. What can be wrong with a command's arguments is
    checked before.
    """
    load_kernels([*model.text_tokenizer.kernels(text_bytes), *model.kernels(*heads)])
    model.prepare(*heads)


def complete_session(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a session in the shell."""
    from rwkv_cli.engine import sessions

    return [name for name in sessions.names() if name.startswith(incomplete)]
