"""The plan of a program's memory: nothing in use is given out again, and what is free is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from lab import lone_arrays
from numpy.typing import NDArray

import rwkv_cli
from rwkv_cli.kernels.memory import Buffer, plan


@pytest.mark.parametrize("seed", range(30))
def test_no_two_living_buffers_overlap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    buffers = [Buffer(int(rng.integers(1, 5000))) for _ in range(60)]
    for buffer in buffers:
        first = int(rng.integers(0, 50))
        for step in sorted({first, first + int(rng.integers(0, 12))}):
            buffer.used_at(step)
    offsets, size = plan(buffers, 64)
    assert set(offsets) == set(buffers)
    for i, a in enumerate(buffers):
        assert offsets[a] % 64 == 0
        assert offsets[a] + a.size <= size
        for b in buffers[:i]:
            if a.first <= b.last and b.first <= a.last:
                assert offsets[a] + a.size <= offsets[b] or offsets[b] + b.size <= offsets[a]
    living = [sum(-(-b.size // 64) * 64 for b in buffers if b.first <= step <= b.last) for step in range(70)]
    assert max(living) <= size <= 1.6 * max(living), "memory that is free is used again"


def test_what_is_never_used_takes_nothing() -> None:
    used, unused = Buffer(100), Buffer(1 << 40)
    used.used_at(3)
    offsets, size = plan([unused, used])
    assert offsets == {used: 0}
    assert size == 128


def test_a_chain_takes_two_places() -> None:
    """Each step reads what the one before wrote: the memory of the first serves the third."""
    chain = [Buffer(1000) for _ in range(10)]
    for step in range(10):
        for buffer in chain[step : step + 2]:
            buffer.used_at(step)
    offsets, size = plan(chain)
    assert size == 2048
    assert {offsets[buffer] for buffer in chain} == {0, 1024}


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_arrays_that_share_memory_keep_their_numbers(
    converted: Callable[..., Path], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose arrays lie as they are planned gives the bits of one whose arrays all lie alone."""
    path, ids = converted(version), np.random.default_rng(2).integers(0, 300, 30)

    def results() -> list[NDArray[Any]]:
        model = rwkv_cli.load(path)
        every, state = model.forward(ids, all_logits=True)
        last = model.advance([5], state)
        return [every, last, model.losses(ids[:-1], ids[1:], model.new_state()), *state.arrays().values()]

    shared = results()
    lone_arrays(monkeypatch)
    for one, other in zip(shared, results(), strict=True):
        np.testing.assert_array_equal(one, other)
