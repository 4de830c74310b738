"""The command `rwkv serve`."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_cli.commands.configured import from_file
from rwkv_cli.commands.options import (
    ModelWord,
    check_draft,
    device_options,
    draft_options,
    load_server_model,
    named_model,
    open_model,
    speculation_by,
    whole_option,
)
from rwkv_cli.terminal.output import note
from rwkv_cli.terminal.settings import SAMPLING

if TYPE_CHECKING:
    from rwkv_cli.engine.model import LanguageModel
    from rwkv_cli.engine.speculation import Speculation

_MB = 1 << 20


@click.command("serve")
@click.option(
    "-m",
    "--model",
    type=ModelWord(),
    multiple=True,
    envvar="RWKV_MODEL",
    metavar="MODEL",
    help="A path, a name that rwkv models lists, or the beginning of one; may be given again. Default: $RWKV_MODEL, "
    "else the bundled storyteller.",
)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen at.")
@whole_option("--port", default=8000, least=0, most=65535, help="0 takes a free one.")
@device_options
@click.option("--api-key", envvar="RWKV_API_KEY", metavar="KEY", help="Key that clients need; or set $RWKV_API_KEY.")
@click.option("--no-auth", is_flag=True, help="Serve other machines without a key.")
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="Name by which clients may call this machine; may be given again.",
)
@click.option(
    "--cors", multiple=True, metavar="ORIGIN", help="Web site whose pages may use the server; may be given again."
)
@whole_option("--max-requests", default=64, help="Answers that may run or wait; more are refused.")
@whole_option("--batch-size", default=16, help="How many answers go through the model together.")
@whole_option("-n", "--max-tokens", default=4096, help="The most tokens of an answer.")
@whole_option("--max-body", default=8, metavar="MB", help="The largest request.")
@whole_option("--cache", default=512, metavar="MB", least=0, help="Memory for the states of texts that were read.")
@whole_option(
    "--cache-disk",
    default=1024,
    metavar="MB",
    least=0,
    help="Disk for those that memory has no room for; 0 writes none.",
)
@whole_option("--grace", default=30, metavar="SECONDS", help="On SIGTERM, time for answers in the making.")
@draft_options
def command(
    *,
    model: tuple[str, ...],
    host: str,
    port: int,
    threads: int | None,
    device: str,
    api_key: str | None,
    no_auth: bool,
    allow_host: tuple[str, ...],
    cors: tuple[str, ...],
    max_requests: int,
    batch_size: int,
    max_tokens: int,
    max_body: int,
    cache: int,
    cache_disk: int,
    grace: int,
    draft: str | None,
    lookup: bool,
) -> None:
    """Serve models to programs that speak OpenAI's interface: /v1/chat/completions, /v1/completions, /v1/embeddings.

    Clients take http://127.0.0.1:8000/v1 as their base URL and any key. Other machines are served only with --api-key.
    What was read is remembered, so that a long conversation goes on at once. Ctrl-C stops.

    \b
    rwkv serve -m stories.safetensors -m rwkv7-0.4B.safetensors --port 9000
    """
    if not _is_loopback(host) and not (api_key or no_auth):
        raise click.UsageError(f"--host {host} serves other machines: give --api-key KEY, or --no-auth to let all in")
    if api_key == "":
        raise click.BadParameter("an empty key is none", param_hint="--api-key")
    check_draft(draft, lookup)
    try:
        from rwkv_cli.server.app import bind, serve
        from rwkv_cli.server.hosting import Host, Hosted, Settings, Usual
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f'serve needs {error.name}; install it with: pip install "rwkv-cli[serve]"'
        ) from None
    from rwkv_cli.engine.library import name_of
    from rwkv_cli.engine.prefixes import Bounds, Prefixes, states_folder
    from rwkv_cli.engine.scheduler import Limits, Scheduler
    from rwkv_cli.errors import DraftError

    guesser: LanguageModel | None = None
    speculations: dict[LanguageModel, Speculation | None] = {}

    def load(path: Path) -> LanguageModel:
        made = load_server_model(path, device, threads)
        try:
            speculations[made] = speculation_by(made, guesser, lookup)
        except DraftError as error:
            if not speculations:  # this is the model that the draft was chosen for
                raise
            note(f"{error}. {made.path.name} answers without guesses.")
        return made

    hosted: dict[str, Hosted] = {}
    for path in map(named_model, model or (None,)):
        name = name_of(path).removesuffix(".safetensors")
        if name in hosted:
            raise click.UsageError(f"two models are named {name}: {hosted[name].path} and {path}; rename one")
        hosted[name] = Hosted(
            name, path, load, in_chats=Usual(**_set("chat", path)), elsewhere=Usual(**_set("generate", path))
        )
    with bind(host, port) as listening:
        guesser = None if draft is None else open_model(draft, "cpu", threads)
        next(iter(hosted.values())).model()  # what is wrong with the first model is said now
        folder = states_folder() if cache_disk and cache else None
        prefixes = Prefixes(Bounds(memory=cache * _MB, disk=cache_disk * _MB, folder=folder)) if cache else None
        inside = Host(
            hosted,
            Scheduler(Limits(running=batch_size, waiting=max_requests), prefixes, speculations.get),
            Settings(
                max_tokens=max_tokens,
                body_bytes=max_body * _MB,
                api_key=api_key,
                hosts=frozenset(name.lower() for name in (host, *allow_host)),
                origins=frozenset(origin.rstrip("/") for origin in cors),
            ),
            note,
        )
        at = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        said = f"Serving {', '.join(hosted)} at {at}/v1, and a page for chats at {at} (Ctrl-C stops)."
        serve(inside, listening, grace, lambda: note(said))


def _set(command: str, path: Path) -> dict[str, Any]:
    """Return what config.toml sets for the texts of a command with this model, as `Usual` takes it."""
    found = from_file(command, [f"--model={path}"])
    names = ("seed", "max_tokens", "system", "template", "style", "think")
    settings: dict[str, Any] = {name: found[name] for name in names if name in found}
    return settings | {"sampling": {n: found[n] for n in SAMPLING if n in found and n != "seed"}}


def _is_loopback(host: str) -> bool:
    """Return whether an address is this machine's alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
