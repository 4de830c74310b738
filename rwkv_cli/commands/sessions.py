"""The command `rwkv sessions`."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from rwkv_cli.commands.options import complete_session
from rwkv_cli.errors import SessionError, reason
from rwkv_cli.terminal.output import columns, note, write


@click.group("sessions")
def command() -> None:
    """List, show and remove the chats that rwkv chat --session NAME has kept.

    \b
    rwkv sessions list
    rwkv sessions show diary > diary.md
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a session.")
def list_(as_json: bool) -> None:
    """List the kept chats, the last used first."""
    from rwkv_cli.engine import library, sessions

    rows = []
    for name in sessions.names():
        try:
            data: dict[str, Any] = sessions.read(name)
        except SessionError as error:
            note(str(error))
            continue
        row = {"name": name, "turns": len(data["turns"]), "saved": data["saved"], "model": data["model"]["path"]}
        rows.append(row)
        if as_json:
            click.echo(json.dumps(row))
    if not as_json and rows:
        table = [(r["name"], r["turns"], _local(r["saved"]), library.name_of(Path(r["model"]))) for r in rows]
        click.echo(columns([("name", "turns", "saved", "model"), *table], right=[1]))
    elif not rows:
        note("No sessions; rwkv chat --session NAME begins one.")


def _local(saved: str) -> str:
    """Return a time as this machine's clock shows it."""
    try:
        return datetime.fromisoformat(saved).astimezone().strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError):
        return saved


@command.command("show")
@click.argument("name", shell_complete=complete_session)
@click.option("--json", "as_json", is_flag=True, help="The transcript as one JSON object.")
def show(name: str, as_json: bool) -> None:
    """Print what was said in the session NAME, as Markdown."""
    from rwkv_cli.engine import sessions
    from rwkv_cli.engine.conversation import Turn, markdown

    data = sessions.read(name)
    if as_json:
        click.echo(json.dumps({key: value for key, value in data.items() if key != "states"}))
    else:
        turns = [Turn(turn["user"], turn["answer"], None) for turn in data["turns"]]
        write(markdown(Path(data["model"]["path"]).name, turns))


@command.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_session)
def rm(names: tuple[str, ...]) -> None:
    """Delete sessions: transcripts and states."""
    from rwkv_cli.engine import sessions

    missed = []
    for name in names:
        try:
            sessions.remove(name)
            note(f"Removed {name}.")
        except (SessionError, OSError) as error:
            missed.append(reason(error) if isinstance(error, OSError) else str(error))
    if missed:
        raise SessionError("; ".join(missed))
