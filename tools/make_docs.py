"""Write docs/cli.md: the help of every command, as it prints it. A test compares the file with the help."""

from pathlib import Path

import click
from click.testing import CliRunner

from rwkv_cli.main import COMMANDS, cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"


def page() -> str:
    """The whole file."""
    parts = ["# Commands\n\nWhat `rwkv COMMAND --help` prints. Made by `make docs`.\n"]
    for name in _names():
        words = name.split()
        help_ = CliRunner().invoke(cli, [*words, "--help"], prog_name="rwkv", terminal_width=100).output
        parts.append(f"## rwkv{' ' + name if name else ''}\n\n```\n{help_.rstrip()}\n```\n")
    return "\n".join(parts)


def _names() -> list[str]:
    """Every command, a group's own ones after it."""
    names = [""]
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        names += [name, *(f"{name} {sub}" for sub in getattr(command, "commands", ()))]
    return names


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
