"""Texts of a tiny model over bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result


@pytest.fixture
def generate(rwkv: Callable[..., Result], byte_model: Path) -> Callable[..., Result]:
    """`rwkv generate` on a model over bytes, greedily and without an end."""

    def run(*args: object, model: Path = byte_model, **kwargs: Any) -> Result:
        return rwkv("generate", *args, "-m", model, "--temperature", 0, "--ignore-eos", **kwargs)

    return run
