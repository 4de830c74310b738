"""Chats whose turns come through a pipe, and the folder that keeps them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of sessions, for this test alone."""
    monkeypatch.setattr("rwkv_cli.engine.sessions.folder", lambda: tmp_path / "sessions")
    return tmp_path / "sessions"


@pytest.fixture
def chat(rwkv: Callable[..., Result], byte_model: Path) -> Callable[..., Result]:
    """A chat with a tiny model. The input is its turns, a line each."""

    def run(*options: object, input: str | bytes = "") -> Result:
        return rwkv("chat", "-m", byte_model, "-n", 12, *options, input=input)

    return run
