"""The command `rwkv chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rwkv_cli.commands.options import (
    check_draft,
    check_there,
    complete_session,
    draft_options,
    is_given,
    make_ready,
    model_options,
    open_model,
    open_speculation,
    sampling_options,
    state_option,
    template_options,
)
from rwkv_cli.commands.texts import read_text
from rwkv_cli.errors import SessionError
from rwkv_cli.terminal.settings import MAX_TOKENS


@click.command("chat")
@click.argument("question", nargs=-1, metavar="[QUESTION]")
@model_options
@template_options
@click.option("--system", metavar="TEXT", help="What the model is told before the first turn.")
@click.option(
    "--session",
    metavar="NAME",
    shell_complete=complete_session,
    help="Keep the conversation under this name, and go on with it if it is there.",
)
@click.option("--last", is_flag=True, help="Go on with the last chat of more than one turn that has no name.")
@click.option("--whole", is_flag=True, help="Take all of standard input as one turn, and end after its answer.")
@state_option
@click.option(
    "-n",
    "--max-tokens",
    type=MAX_TOKENS,
    metavar="N",
    help="End an answer after N tokens; default: 1024, with reasoning 4096.",
)
@sampling_options
@draft_options
def command(
    *,
    question: tuple[str, ...],
    model: str | None,
    threads: int | None,
    device: str,
    template: str | None,
    style: str | None,
    system: str | None,
    think: str | None,
    session: str | None,
    last: bool,
    whole: bool,
    state: Path | None,
    max_tokens: int | None,
    seed: int | None,
    draft: str | None,
    lookup: bool,
    **sampling: Any,
) -> None:
    """Talk with a model, turn by turn. It remembers the conversation; Ctrl-C ends an answer, /help lists commands.

    With QUESTION it answers once and ends. What comes on standard input is joined to QUESTION after a blank line; an
    argument - says that it goes elsewhere. Without QUESTION each line of standard input is a turn, so it works in a
    pipe too. Sampling defaults are those the template's authors use.

    \b
    rwkv chat -m RWKV-x070-World-0.1B.int8.safetensors
    rwkv chat --session diary
    rwkv chat "What is this letter about?" < letter.txt
    """
    from rwkv_cli.engine import library, sessions
    from rwkv_cli.engine.conversation import Conversation
    from rwkv_cli.engine.sessions import Session
    from rwkv_cli.models.tuned import read_tuned_state
    from rwkv_cli.terminal.repl import Repl

    if last and session is not None:
        raise click.UsageError("--last and --session exclude each other: the last chat without a name is meant")
    if last and not sessions.exists(sessions.LAST):
        raise click.UsageError("there is no last chat; a chat of two turns or more at a terminal becomes it")
    name = sessions.LAST if last else session
    kept = Session(name) if name is not None else None
    resumed = name if name is not None and sessions.exists(name) else None
    if resumed and any(map(is_given, ("template", "style", "state", "system"))):
        what = "the last chat" if last else f"session {name}"
        raise click.UsageError(f"{what} has begun: --template, --style, --system and --state are for a new one")
    text = ""
    if question or whole:
        text = read_text(question or ["-"], needed=True).decode("utf-8", "replace")
        if not text.strip():
            raise click.UsageError("the question is empty; give some text to answer")
    if resumed and not is_given("model"):
        known = library.again(Path(sessions.read(resumed)["model"]["path"]))
        model = str(known) if known is not None else model
    check_there(state)
    check_draft(draft, lookup)
    lm = open_model(model, device, threads)
    if resumed:
        kept, talk = Session.resume(resumed, lm)
        if think is not None and is_given("think"):
            talk.set_think(think)
        talk.settings = talk.settings.changed(**{name: value for name, value in sampling.items() if is_given(name)})
        if is_given("max_tokens"):
            talk.max_tokens = max_tokens
        if seed is not None and is_given("seed"):
            talk.set_seed(seed)
    else:
        form = lm.template.template(template, style)
        think = think or form.default_think
        start = read_tuned_state(state, lm) if state is not None else None
        talk = Conversation(
            lm,
            form,
            form.sampling_for(think).changed(**sampling),
            seed,
            max_tokens,
            system=system or "",
            think=think,
            start=start,
        )
    make_ready(lm, "last", text_bytes=len(text.encode()))
    talk.speculation = open_speculation(lm, draft, lookup, threads)
    repl = Repl(talk, kept)
    if text:
        repl.ask(text)
    else:
        repl.converse()
    if repl.unsaved:
        raise SessionError("the chat's last turns are not on disk, for the reason above")
