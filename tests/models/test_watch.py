"""What watches a long call: it changes no bit, it may end the call, and then the state is what it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rwkv_cli
from rwkv_cli.engine.completion import Completion, Request
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.kernels.cpu import steps

VERSIONS = ["4", "5.0", "5.1", "5.2", "6", "7"]
IDS = [int(token) for token in np.random.default_rng(1).integers(1, 60, 530)]


def arrays(state: Any) -> list[Any]:
    return [array.copy() for array in state.arrays().values()]


@pytest.fixture
def _one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of a program is a part of its own."""
    monkeypatch.setattr(steps, "_SECONDS", 0.0)


@pytest.mark.usefixtures("_one_by_one")
@pytest.mark.parametrize("quant", ["int8", "none"])
@pytest.mark.parametrize("version", VERSIONS)
def test_it_changes_no_bit(version: str, quant: str, converted: Callable[..., Path]) -> None:
    model = rwkv_cli.load(converted(version, quant))
    alone, watched, seen = model.new_state(), model.new_state(), list[int]()
    want = model.advance(IDS, alone)
    np.testing.assert_array_equal(model.advance(IDS, watched, watch=seen.append), want)
    for a, b in zip(arrays(alone), arrays(watched), strict=True):
        np.testing.assert_array_equal(a, b)
    assert seen == sorted(seen)
    assert seen[-1] == len(IDS)
    assert len(set(seen)) > 20
    losses = [model.losses(IDS, IDS, model.new_state(), watch=watch) for watch in (None, seen.append)]
    np.testing.assert_array_equal(*losses)


@pytest.mark.usefixtures("_one_by_one")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_it_may_end_the_call(byte_model: Path, error: type[BaseException]) -> None:
    model = rwkv_cli.load(byte_model)
    state = model.new_state()
    model.advance(IDS[:7], state)
    before, calls, last = arrays(state), 0, 0
    model.advance(IDS, state.clone(), watch=lambda _: None)

    def watch(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            raise error

    for at in (1, 5, 60):  # in the first chunk, there too, in the second one
        calls, last = 0, at
        with pytest.raises(error):
            model.advance(IDS, state, watch=watch)
        for a, b in zip(before, arrays(state), strict=True):
            np.testing.assert_array_equal(a, b)
    assert np.isfinite(model.advance([3], state)).all()


def test_it_is_called_in_time(byte_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part takes a tenth of a second or is one step; a step that takes 0.5 ms has others beside it."""
    now = [0.0]
    ran: list[int] = []

    def run(_: Any, table: Any, *rest: Any) -> None:  # noqa: ARG001
        ran.append(len(table))
        now[0] += 5e-4 * len(table)

    model = rwkv_cli.load(byte_model)
    monkeypatch.setattr("rwkv_cli.kernels.cpu.team.Team.run", run)
    monkeypatch.setattr(steps.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(steps, "_SECONDS", 5e-3)
    model.advance(IDS[:200], model.new_state(), watch=lambda _: None)
    assert ran[0] <= 2
    assert 8 <= max(ran) <= 24
    assert sum(ran[1:-1]) / len(ran[1:-1]) > 5


@pytest.mark.usefixtures("_one_by_one")
def test_a_completion_is_cancelled_within_a_part(byte_model: Path) -> None:
    model = rwkv_cli.load(byte_model)
    want = model.new_state()
    model.advance(IDS[: model.backend.chunk], want)
    completion = Completion(model, model.new_state(), Sampler(Sampling(), 0), Request(IDS, 1))
    read: list[int] = []

    def on_read(tokens: int) -> None:
        read.append(tokens)
        if tokens > model.backend.chunk + 20:
            completion.cancel()

    assert list(completion.stream(on_read)) == []
    assert model.backend.chunk + 20 < read[-1] < model.backend.chunk + 60
    assert (completion.result.stop, completion.result.prompt_tokens) == ("interrupted", model.backend.chunk)
    for a, b in zip(arrays(want), arrays(completion.state), strict=True):
        np.testing.assert_array_equal(a, b)
