"""The memory in which every device proves its debts."""

from collections.abc import Iterator

import pytest
from lab import guarded_gpu, lone_arrays


@pytest.fixture
def lone_memory(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Every array lies alone between bands that nobody may write, on the simulated GPU too."""
    lone_arrays(monkeypatch)
    if request.getfixturevalue("device") == "cuda":
        pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (rwkv-cli[cuda])")
        with guarded_gpu(monkeypatch):
            yield
    else:
        yield
