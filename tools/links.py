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
    """Make the folder anew: links to the parts of the package itself, and to each source folder beside it."""
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(LINKS, ignore_errors=True)
    for name, folder in sorted(mapping.items()):
        target = LINKS.joinpath(*name.split("."))
        if "." in name:
            target.symlink_to(os.path.relpath(ROOT / folder, target.parent), target_is_directory=True)
            continue
        target.mkdir(parents=True)
        for part in (ROOT / folder).iterdir():
            if part.suffix in {".py", ".typed"} or (part / "__init__.py").is_file():
                (target / part.name).symlink_to(os.path.relpath(part, target), target_is_directory=part.is_dir())


if __name__ == "__main__":
    main()
