"""The command `rwkv config`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from rwkv_cli.commands.configured import leaves, options, origin, parsed
from rwkv_cli.terminal.output import columns, note, one_line


@click.command("config", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND [OPTION]...]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def command(ctx: click.Context, args: tuple[str, ...], as_json: bool) -> None:
    """Show the options of COMMAND and where each value comes from: the command line, the environment, the file
    config.toml, or a default. Without COMMAND it checks the file and shows what that sets.

    The file lies in your config folder, or is $RWKV_CONFIG. Its keys are the long names of options. Those at its top
    are for every command, those in a table [COMMAND] for that one, and those in [presets."BEGINNING OF A NAME"] for
    models with such a name.

    \b
    rwkv config
    rwkv config chat -m storyteller --temperature 0.5
    """
    root = ctx.find_root()
    rows = _of_command(root, list(args)) if args else _of_file(root)
    if as_json:
        facts = {name: {"value": _plain(value), "from": source, "by": by or None} for name, value, source, by in rows}
        click.echo(json.dumps(facts))
        return
    table = [(name, _shown(value), f"{source} ({by})" if by else source) for name, value, source, by in rows]
    click.echo(columns([("setting", "value", "from"), *table]))


Row = tuple[str, Any, str, str]
"""A setting, its value, where it comes from, and what names it there."""


def _of_command(root: click.Context, args: list[str]) -> list[Row]:
    """List the options of a command as it would get them."""
    parent, group = root, root.command
    assert isinstance(group, click.Group)
    name, found, rest = group.resolve_command(parent, args)
    while isinstance(found, click.Group) and rest and found.get_command(parent, rest[0]) is not None:
        parent = click.Context(found, parent, name)
        name, found, rest = found.resolve_command(parent, rest)
    assert found is not None
    assert name is not None
    ctx = parsed(found, name, parent, rest)
    return [(key, ctx.params[param.name or ""], *origin(ctx, param)) for key, param in options(found).items()]


def _of_file(root: click.Context) -> list[Row]:
    """List what the file and the environment set, after every command has checked its part."""
    from rwkv_cli.engine import library, preferences

    path = preferences.file()
    places = [("config file", str(path), "RWKV_CONFIG"), ("models folder", str(library.folder()), "RWKV_MODELS")]
    rows = [(what, place, *_by(variable)) for what, place, variable in places]
    if os.environ.get("RWKV_MODEL"):
        rows.append(("model", os.environ["RWKV_MODEL"], *_by("RWKV_MODEL")))
    settings = preferences.read()
    for name, found, parent in leaves(root):
        parsed(found, name, parent)
        for beginning in settings.get("presets", {}) if "model" in options(found) else ():
            parsed(found, name, parent, [beginning if name == "info" else f"--model={beginning}"])
    rows += [(key, value, "file", "") for key, value in _flat(settings)]
    if path is None or not path.is_file():
        note(f"There is no {one_line(path)}; options have their defaults.")
    return rows


def _by(variable: str) -> tuple[str, str]:
    """Say whether an environment variable sets something."""
    return ("environment", f"${variable}") if os.environ.get(variable) else ("default", "")


def _flat(table: dict[str, Any], where: str = "") -> list[tuple[str, Any]]:
    """List the values of a table and of those in it, with their whole keys."""
    found = []
    for key, value in table.items():
        found += _flat(value, f"{where}{key}.") if isinstance(value, dict) else [(f"{where}{key}", value)]
    return found


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _shown(value: Any) -> str:
    """Write a value for the table."""
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)
