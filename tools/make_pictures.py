"""Pictures of the terminal for README: runs each command in tmux and saves what is on the screen as SVG in docs/.

python tools/make_pictures.py            (needs tmux, and the command `rwkv` beside this Python)
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).resolve().parent.parent / "docs"
WIDTH = 100
PICTURES: dict[str, tuple[int, str, list[str]]] = {
    "chat": (46, "rwkv chat --seed 1", [
        "Tell me a story about a brave little dog.", "/retry", "/undo", "Thanks!", "/stats",
    ]),
    "convert": (30, "rwkv convert storyteller.pth", []),
}  # fmt: skip
"""Name: lines of screen, command, and what is typed once it waits for input."""


def tmux(*args: str) -> str:
    return subprocess.run(["tmux", "-L", "pictures", *args], check=True, capture_output=True, text=True).stdout


def settled() -> str:
    """The screen, colours included, once it has stood still for a second."""
    before, since = "", time.monotonic()
    while time.monotonic() - since < 1.5:
        time.sleep(0.1)
        screen = tmux("capture-pane", "-p", "-e")
        if screen != before:
            before, since = screen, time.monotonic()
    return before


def record(lines: int, command: str, typed: list[str], folder: Path) -> str:
    """The screen after a command, and after each line that is typed to it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    home = f"XDG_STATE_HOME={folder}/home XDG_DATA_HOME={folder}/home"
    shell = f"cd {folder} && env {home} PATH='{path}' PS1='$ ' TERM=xterm-256color bash --norc"
    tmux("new-session", "-d", "-x", str(WIDTH), "-y", str(lines), shell)
    try:
        for line in [command, *typed]:
            settled()
            tmux("send-keys", "-l", line)
            time.sleep(0.3)
            tmux("send-keys", "Enter")
        return settled()
    finally:
        tmux("kill-server")


def main() -> None:
    import rwkv_cli

    for name, (lines, command, typed) in PICTURES.items():
        with tempfile.TemporaryDirectory() as folder:
            for source in Path(rwkv_cli.__file__).parent.glob("storyteller*"):
                (Path(folder) / source.name).symlink_to(source)
            screen = record(lines, command, typed, Path(folder))
        console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(Text.from_ansi(screen.rstrip()))
        console.save_svg(str(DOCS / f"{name}.svg"), title=command, unique_id=name)
        print(f"docs/{name}.svg")


if __name__ == "__main__":
    main()
