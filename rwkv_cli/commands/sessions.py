"""rwkv sessions"""

from __future__ import annotations

import json
from typing import Any

import click

from rwkv_cli.commands.options import complete_session
from rwkv_cli.errors import SessionError


@click.group("sessions")
def command() -> None:
    """Chats kept with `rwkv chat --session NAME`.

    \b
    rwkv sessions list
    rwkv sessions show diary > diary.md
    """  # fmt: skip


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a session.")
def list_(as_json: bool) -> None:
    """List them, the last used first."""
    from pathlib import Path

    from rwkv_cli.engine import sessions as session
    from rwkv_cli.terminal.output import columns, note

    rows = []
    for name in session.names():
        try:
            data: dict[str, Any] = session.read(name)
        except SessionError as error:
            note(str(error))
            continue
        row = {"name": name, "turns": len(data["turns"]), "saved": data["saved"], "model": data["model"]["path"]}
        rows.append(row)
        if as_json:
            click.echo(json.dumps(row))
    if not as_json and rows:
        table = [(r["name"], r["turns"], r["saved"].replace("T", " ")[:16], Path(r["model"]).name) for r in rows]
        click.echo(columns([("name", "turns", "saved (UTC)", "model"), *table], right=[1]))
    elif not rows:
        note("No sessions; rwkv chat --session NAME begins one.")


@command.command("show")
@click.argument("name", shell_complete=complete_session)
@click.option("--json", "as_json", is_flag=True, help="The transcript as one JSON object.")
def show(name: str, as_json: bool) -> None:
    """Print what was said in the session NAME, as Markdown."""
    from pathlib import Path

    from rwkv_cli.engine import sessions as session
    from rwkv_cli.engine.conversation import Turn, markdown
    from rwkv_cli.terminal.output import write

    data = session.read(name)
    if as_json:
        click.echo(json.dumps({key: value for key, value in data.items() if key != "states"}))
    else:
        turns = [Turn(turn["user"], turn["answer"], None) for turn in data["turns"]]
        write(markdown(Path(data["model"]["path"]).name, turns))


@command.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_session)
def rm(names: tuple[str, ...]) -> None:
    """Delete sessions: transcripts and states."""
    from rwkv_cli.engine import sessions as session
    from rwkv_cli.terminal.output import note

    for name in names:
        session.remove(name)
        note(f"Removed {name}.")
