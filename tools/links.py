"""Lay the four source folders out as one importable package in .links/, for type checkers and editors.

They cannot read `package-dir` from pyproject.toml, and see only a part of an editable install.
"""

import os
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKS = ROOT / ".links"


def main() -> None:
    """Make the folder anew: a link a file for the package itself, a link a folder below it."""
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(LINKS, ignore_errors=True)
    for name, folder in sorted(mapping.items()):
        target = LINKS.joinpath(*name.split("."))
        if "." in name:
            target.symlink_to(os.path.relpath(ROOT / folder, target.parent), target_is_directory=True)
            continue
        target.mkdir(parents=True)
        for file in (ROOT / folder).iterdir():
            if file.suffix in {".py", ".typed"}:
                (target / file.name).symlink_to(os.path.relpath(file, target))


if __name__ == "__main__":
    main()
