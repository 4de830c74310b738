"""The command `rwkv chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rwkv_cli.commands.options import complete_session, model_options, open_model, sampling_options, state_option


@click.command("chat")
@model_options
@click.option(
    "--template",
    type=click.Choice(["world", "g1", "raven", "qa", "plain"]),
    help="How turns are written; default: what conversion found.",
)
@click.option("--system", metavar="TEXT", help="What the model is told before the first turn.")
@click.option(
    "--think",
    type=click.Choice(["off", "on", "short", "long", "fast"]),
    help="How long a reasoning model (G1) thinks before it answers; default: on for such models.",
)
@click.option(
    "--session",
    metavar="NAME",
    shell_complete=complete_session,
    help="Keep the conversation under this name, and go on with it if it is there.",
)
@state_option
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="End an answer after N tokens; default: 1024, with reasoning 4096.",
)
@sampling_options
def command(
    *,
    model: Path | None,
    threads: int | None,
    device: str,
    template: str | None,
    system: str | None,
    think: str | None,
    session: str | None,
    state: Path | None,
    max_tokens: int | None,
    seed: int | None,
    **sampling: Any,
) -> None:
    """Talk with a model, turn by turn. It remembers the conversation; Ctrl-C ends an answer, /help lists commands.

    Reads turns from standard input a line at a time, so it works in a pipe too. Sampling defaults are those the
    template's authors use.

    \b
    rwkv chat -m RWKV-x070-World-0.1B.int8.safetensors
    rwkv chat --session diary
    """
    from rwkv_cli.engine import sessions
    from rwkv_cli.engine.conversation import Conversation
    from rwkv_cli.engine.sessions import Session
    from rwkv_cli.engine.templates import TEMPLATES
    from rwkv_cli.models.tuned import read_tuned_state
    from rwkv_cli.terminal.repl import Repl

    kept = Session(session) if session is not None else None
    resumed = session if session is not None and sessions.exists(session) else None
    if resumed and (template or state or system is not None):
        raise click.UsageError(f"session {session} has begun: --template, --system and --state are for a new one")
    if resumed and model is None:
        known = Path(sessions.read(resumed)["model"]["path"])
        model = known if known.exists() else None
    lm = open_model(model, device, threads)
    if resumed:
        kept, talk = Session.resume(resumed, lm)
        talk.settings, talk.max_tokens = talk.settings.changed(**sampling), max_tokens or talk.max_tokens
        if seed is not None:
            talk.set_seed(seed)
    else:
        name = template or lm.template
        if name not in TEMPLATES:
            raise click.ClickException(f"{lm.path}: its chat template {name!r} is unknown; choose one with --template")
        form = TEMPLATES[name]
        start = read_tuned_state(state, lm) if state is not None else None
        talk = Conversation(
            lm,
            form,
            form.sampling.changed(**sampling),
            seed,
            max_tokens,
            system=system or "",
            think="on" if form.thinks else "off",
            start=start,
        )
    if think is not None:
        talk.set_think(think)
    Repl(talk, kept).converse()
