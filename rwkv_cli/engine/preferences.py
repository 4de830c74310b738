"""The user's config.toml: defaults for options, and presets for models."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs

from rwkv_cli.errors import PreferencesError


def file() -> Path | None:
    """Return where the file is, or would be: $RWKV_CONFIG, else in the user's config folder. None without a home."""
    named = os.environ.get("RWKV_CONFIG")
    if named:
        return Path(named).absolute()
    try:
        return platformdirs.user_config_path("rwkv", appauthor=False) / "config.toml"
    except RuntimeError:
        return None


def read() -> dict[str, Any]:
    """Read the file as TOML. A file that is not there is empty. Raises PreferencesError and OSError."""
    path = file()
    if path is None or not path.is_file():
        return {}
    import tomllib  # this takes longer than all of a command's help

    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise PreferencesError(f"{path}: is no TOML: {why}") from None


def presets_for(presets: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, tuple[str, Any]]:
    """Collect the settings of all presets whose name a model's name begins with. Those of longer names go first.

    Each comes with the preset that it is from.
    """
    found: dict[str, tuple[str, Any]] = {}
    for beginning in sorted(presets, key=len):
        if name.casefold().startswith(beginning.casefold()):
            found |= {key: (beginning, value) for key, value in presets[beginning].items()}
    return found
