"""Options that commands share, and the opening of the model that they name."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from rwkv_cli.commands.configured import apply_preset, origin, parsed
from rwkv_cli.errors import ModelNameError, reason
from rwkv_cli.terminal.compiling import announce_trouble, load_kernels
from rwkv_cli.terminal.converting import converting_bar
from rwkv_cli.terminal.output import loading_bar, note, one_line
from rwkv_cli.terminal.plot import SUFFIXES
from rwkv_cli.terminal.settings import SAMPLING, Whole

if TYPE_CHECKING:
    from rwkv_cli.engine.cluster import Place
    from rwkv_cli.engine.drafting import Drafter
    from rwkv_cli.engine.model import LanguageModel
    from rwkv_cli.engine.speculation import Speculation
    from rwkv_cli.models.base import Head

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


def together(*options: Decorator) -> Decorator:
    """Return what adds all these options to a command, in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def whole_option(
    *names: str, help: str, default: int | None = None, metavar: str = "N", least: int = 1, most: int | None = None
) -> Decorator:
    """Add an option that is a whole number within bounds. The help shows both, and its default if it has one."""
    kind = Whole(least, most)
    return click.option(*names, type=kind, default=default, show_default=True, metavar=metavar, help=help)


def file_option(*names: str, help: str, metavar: str = "FILE") -> Decorator:
    """Add an option that names a file. The command gets `Path | None`."""
    return click.option(*names, type=click.Path(path_type=Path), metavar=metavar, help=help)


class ModelWord(click.ParamType[str]):
    """A path, a name or the unique beginning of a name, for `engine.named.model_file`."""

    name = "model"
    envvar_list_splitter = os.pathsep
    """The character between several in the environment."""

    def shell_complete(
        self,
        ctx: click.Context,
        param: click.Parameter,
        incomplete: str,
    ) -> list[CompletionItem]:
        """Complete a name in the shell, or else a path."""
        names = complete_model(ctx, param, incomplete)
        return [*map(CompletionItem, names), CompletionItem(incomplete, type="file")]


def model_option(command: Command) -> Command:
    """Add -m. The command gets `model: str | None` for `named_model`."""
    return click.option(
        "-m",
        "--model",
        type=ModelWord(),
        envvar="RWKV_MODEL",
        is_eager=True,
        callback=_bring_presets,
        metavar="MODEL",
        help="A path, a name that rwkv models lists, or the beginning of one; default: $RWKV_MODEL, else the "
        "bundled storyteller.",
    )(command)


def _bring_presets(ctx: click.Context, _param: click.Parameter, word: str | None) -> str | None:
    """Have the other options take what config.toml says for this model. They are read after this one."""
    from rwkv_cli.engine import library

    try:
        name = library.find(word).name if word is not None else "storyteller"
    except (ModelNameError, OSError):  # said when the model is opened
        name = Path(str(word)).name
    apply_preset(ctx, name)
    return word


device_options = together(
    whole_option("--threads", help="CPU threads; default: one a core."),
    click.option(
        "--device", type=click.Choice(["cpu", "cuda", "auto"]), default="cpu", show_default=True, help="Where to run."
    ),
)
"""Adds --threads and --device. The command gets `threads: int | None` and `device: str`."""

model_options = together(model_option, device_options)
"""Adds -m, --threads and --device."""


def compare_option(help: str) -> Decorator:
    """Add --compare, another model that goes through the same. The command gets `compare: str | None`."""
    return click.option("--compare", type=ModelWord(), metavar="OTHER", help=help)


def sampling_options(command: Command) -> Command:
    """Add the sampler's settings and its seed. The command gets None for an option that is not given."""
    for name, setting in reversed(SAMPLING.items()):
        option = "--" + name.replace("_", "-")
        command = click.option(option, type=setting.kind, metavar=setting.metavar, help=setting.help)(command)
    return command


TEMPLATE_NAMES = ["world", "g1", "g1h", "raven", "qa", "plain"]
"""The templates that --template names."""


template_options = together(
    click.option(
        "--template", type=click.Choice(TEMPLATE_NAMES), help="How turns are written; default: what conversion found."
    ),
    click.option(
        "--style",
        type=click.Choice(["bot", "assistant", "function_calling"]),
        help="The style of template g1h; default: bot.",
    ),
    click.option(
        "--think",
        type=click.Choice(["off", "on", "short", "long", "fast"]),
        help="How long a reasoning model (G1) thinks before it answers; default: on for such models.",
    ),
)
"""Adds --template, --style and --think. The command gets None for an option that is not given."""


quant_option = click.option(
    "--quant",
    type=click.Choice(["int8", "q6", "q5", "q4", "none"]),
    default="int8",
    show_default=True,
    help="Bits of most weights: int8 8.5, q6 6.25, q5 5.25, q4 4.25; none: the source's values.",
)
"""Adds --quant, what weights become in a converted file."""


def _address(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Check an address. One that a file's name was taken for is told how to be written."""
    if value is None or value in ("local", "auto"):
        return value
    host, colon, port = value.rpartition(":")
    if not (host and colon and port.isdecimal()) or "/" in value:
        raise click.BadParameter(f"{value} is not local, auto or HOST:PORT; write --ray local, or put --ray at the end")
    return value


ray_options = together(
    click.option(
        "--ray",
        is_flag=False,
        flag_value="local",
        callback=_address,
        metavar="[ADDRESS]",
        help="Spread the work over a Ray cluster: HOST:PORT of its head, auto, or local (the default), "
        "one that ends with the command.",
    ),
    whole_option(
        "--ray-workers",
        help="With --ray: how many workers, each with its share of the cores; default: one a machine.",
    ),
)
"""Adds --ray and --ray-workers. The command gets `ray: str | None` and `ray_workers: int | None`."""


def place_of(ray: str | None, workers: int | None, threads: int | None, device: str) -> "Place | None":
    """Return where --ray wants the work done, None for here. Refuses options that do not go together."""
    if ray is None:
        if workers is not None:
            raise click.UsageError("--ray-workers goes with --ray only")
        return None
    if device == "auto":
        raise click.UsageError("--device auto does not go with --ray: all workers must compute alike; name the device")
    from rwkv_cli.engine.cluster import Place

    return Place(ray, workers, threads, device)


state_option = file_option("--state", help="Start from a tuned initial state (.pth or .safetensors).")
"""Adds --state, a file for `models.tuned.read_tuned_state`."""


def plot_option(what: str) -> Decorator:
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


def named_model(word: str | None, convert: bool = True) -> Path:
    """Return the converted file that a word stands for. A checkpoint is converted first, or else refused.

    No word stands for the bundled model, with a note on stderr.
    """
    from rwkv_cli.engine import library, preferences
    from rwkv_cli.engine.named import model_file

    if word is None:
        from rwkv_cli.engine.storyteller import storyteller

        announce_trouble()
        found = storyteller(converting_bar, load_kernels)
        note("No model named (-m or $RWKV_MODEL): this is the bundled storyteller.")
        return found
    try:
        found = model_file(word, converting_bar, load_kernels, _quantization() if convert else None)
    except (ModelNameError, OSError) as error:
        ctx = click.get_current_context()
        source, by = origin(ctx, next(param for param in ctx.command.params if param.name == "model"))
        words = ctx.params.get("model")
        if source not in ("environment", "file") or word not in (words if isinstance(words, tuple) else [words]):
            raise
        why = reason(error) if isinstance(error, OSError) else error
        where = f"{by} in {preferences.file()}" if source == "file" else by
        raise click.ClickException(f"{why}; {where} names it") from None
    if Path(word).exists() and not found.samefile(word):
        note(f"{one_line(word)} was converted: this is the model {one_line(library.name_of(found))}.")
    return found


def _quantization() -> str:
    """Return what a checkpoint is converted to by default: the --quant of `rwkv convert`, as config.toml may set it."""
    root = click.get_current_context().find_root()
    assert isinstance(root.command, click.Group)
    convert = root.command.get_command(root, "convert")
    assert convert is not None
    quant: str = parsed(convert, "convert", root).params["quant"]
    return quant


def open_model(word: str | None, device: str, threads: int | None) -> "LanguageModel":
    """Load `named_model(word)`. A model without a tokenizer is refused."""
    from rwkv_cli.engine.model import LanguageModel, no_tokenizer
    from rwkv_cli.terminal.vanished import say_if_it_vanishes

    path = named_model(word)
    say_if_it_vanishes(path)
    with loading_bar(path) as show:
        model = LanguageModel.load(path, device, threads, show)
    if device == "auto":
        note(f"Running on {model.backend.describe()}.")
    if model.tokenizer is None:
        raise no_tokenizer(path)
    return model


def is_given(name: str) -> bool:
    """Return whether a parameter of the running command stands on its command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


draft_options = together(
    click.option(
        "--draft",
        type=ModelWord(),
        metavar="MODEL",
        help="Have a small model of the same vocabulary guess ahead: the same text, faster where it is right.",
    ),
    click.option(
        "--lookup",
        is_flag=True,
        help="Guess that words go on as they did before in the text: the same text, faster where it repeats itself.",
    ),
)
"""Adds --draft and --lookup. The command gets `draft: str | None` and `lookup: bool`, for `open_speculation`."""


def check_draft(draft: str | None, lookup: bool) -> None:
    """Refuse both before anything is loaded."""
    if draft is not None and lookup:
        raise click.UsageError("--draft and --lookup exclude each other: one of them guesses")


def open_speculation(
    model: "LanguageModel", draft: str | None, lookup: bool, threads: int | None
) -> "Speculation | None":
    """Load what guesses ahead of the model's texts, and all kernels that this takes. None without such options."""
    return speculation_by(model, None if draft is None else open_model(draft, "cpu", threads), lookup)


def speculation_by(model: "LanguageModel", draft: "LanguageModel | None", lookup: bool) -> "Speculation | None":
    """Return what guesses ahead of the model's texts, after all kernels that this takes were loaded."""
    from rwkv_cli.engine.drafting import DraftModel, PromptLookup
    from rwkv_cli.engine.speculation import Speculation

    if draft is None and not lookup:
        return None
    drafter: Drafter = PromptLookup() if draft is None else DraftModel(draft, model)
    speculation = Speculation(model, drafter)
    make_ready(model, "ahead")
    if isinstance(drafter, DraftModel):
        make_ready(drafter.model, "last")
    return speculation


def load_server_model(path: Path, device: str, threads: int | None) -> "LanguageModel":
    """Load a model for a server, with the kernels of its passes. A model without a tokenizer is refused."""
    from rwkv_cli.engine.model import LanguageModel, no_tokenizer
    from rwkv_cli.terminal.vanished import say_if_it_vanishes

    say_if_it_vanishes(path)
    model = LanguageModel.load(path, device, threads)
    if model.tokenizer is None:
        raise no_tokenizer(path)
    make_ready(model, "last", "every", "outputs")
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


def complete_model(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a model in the shell."""
    from rwkv_cli.engine import library

    return [name for name in library.names() if name.startswith(incomplete)]


def complete_session(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a session in the shell."""
    from rwkv_cli.engine import sessions

    return [name for name in sessions.names() if name.startswith(incomplete)]
