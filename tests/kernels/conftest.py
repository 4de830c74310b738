"""The memory in which every device proves its debts."""

from collections.abc import Iterator

import pytest
from extras import needs
from lab import guarded_gpu, lone_arrays


@pytest.fixture
def lone_memory(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Every array lies alone between bands that nobody may write, on the simulated GPU too."""
    lone_arrays(monkeypatch)
    if request.getfixturevalue("device") == "cuda":
        needs("numba_cuda", "dev")
        with guarded_gpu(monkeypatch):
            yield
    else:
        yield
