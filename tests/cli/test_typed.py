"""Commands of README, typed one after the other in a fresh folder beside what a clone has."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SKIPPED = {
    "RWKV-x070": "needs a download",
    "rwkv chat": "needs a person",
    "tuned.pth": "needs a tuned state, and none is shipped",
    "--plot": "needs matplotlib, which is an extra",
    "rwkv_cli/storyteller.pth": "is done once, before all others",
}
"""Parts of lines that are not typed, and why."""


def commands() -> list[str]:
    """Return the lines of README that run `rwkv`, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = []
    for language, block in re.findall(r"```(sh|console)\n(.*?)```", text, re.DOTALL):
        lines = block.splitlines()
        if language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        found += [line for line in lines if re.match(r"(rwkv|echo|cat) ", line)]
    return [line for line in found if not any(part in line for part in SKIPPED)]


def test_every_command_of_the_readme_can_be_typed(tmp_path: Path) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "rwkv_cli").symlink_to(ROOT / "rwkv_cli")
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "rwkv").write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m rwkv_cli "$@"\n')
    (bin_ / "rwkv").chmod(0o755)
    home = {f"XDG_{name}_HOME": str(tmp_path / name) for name in ("DATA", "STATE")}
    env = {**os.environ, **home, "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}
    env.pop("RWKV_MODEL", None)
    convert = "rwkv convert rwkv_cli/storyteller.pth storyteller"
    typed = [f"{convert}.int8.safetensors", f"{convert}.float.safetensors --quant none", *commands()]
    assert len(typed) > 8
    for line in typed:
        done = subprocess.run(["/bin/sh", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, check=False)  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stderr}"
