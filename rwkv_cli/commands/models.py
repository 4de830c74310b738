"""The command `rwkv models`."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import click

from rwkv_cli.commands.options import complete_model
from rwkv_cli.errors import ModelNameError, RwkvError, reason
from rwkv_cli.terminal.output import columns, note, one_line


@click.group("models", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a model.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the models that -m knows by name: those in the models folder.

    The folder is $RWKV_MODELS, or lies in your data folder. What rwkv pull gets is put there, and a checkpoint that -m
    names is converted into it, once. You may move converted files there, too.

    \b
    rwkv models
    rwkv models path
    """
    if ctx.invoked_subcommand is not None:
        return
    from rwkv_cli.engine import library

    rows = []
    for name in library.names():
        try:
            rows.append(_row(name))
        except (RwkvError, OSError) as error:
            note(one_line(reason(error) if isinstance(error, OSError) else error))
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
    elif rows:
        click.echo(
            columns([("name", "version", "MB", "bits", "template", "last used"), *map(_cells, rows)], right=[2, 3])
        )
    else:
        note(f"No models in {one_line(library.folder())}; rwkv pull gets one, and rwkv chat -m FILE.pth converts one.")


def _row(name: str) -> dict[str, Any]:
    """Collect what the list says of a model."""
    from rwkv_cli.engine import library
    from rwkv_cli.engine.facts import describe
    from rwkv_cli.quant import Checkpoint

    path = library.path_of(name)
    facts = describe(Checkpoint(path))
    used = library.last_used(path)
    return {
        "name": name,
        "path": facts["path"],
        "version": facts["config"].get("version"),
        "bytes": facts["bytes"],
        "bits_per_weight": facts["bits_per_weight"],
        "template": facts["template"],
        "last_used": None if used is None else datetime.fromtimestamp(used).astimezone().isoformat(timespec="seconds"),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    """Write a model's line of the table."""
    used = row["last_used"]
    return [
        row["name"],
        f"RWKV-{row['version']}",
        f"{row['bytes'] / 1e6:,.1f}",
        f"{row['bits_per_weight']:.2f}",
        row["template"],
        "" if used is None else datetime.fromisoformat(used).strftime("%Y-%m-%d %H:%M"),
    ]


@command.command("path")
@click.argument("name", required=False, shell_complete=complete_model)
def path(name: str | None) -> None:
    """Print where the model NAME lies, or else the models folder."""
    from rwkv_cli.engine import library

    click.echo(library.folder() if name is None else library.path_of(name))


@command.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_model)
def rm(names: tuple[str, ...]) -> None:
    """Delete models. A name has to be whole."""
    from rwkv_cli.engine import library

    missed = []
    for name in names:
        try:
            library.remove(name)
            note(f"Removed {one_line(name)}.")
        except (ModelNameError, OSError) as error:
            missed.append(reason(error) if isinstance(error, OSError) else str(error))
    if missed:
        raise ModelNameError("; ".join(missed))
