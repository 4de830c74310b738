"""How a prompt is cut changes no bit, and no part of it takes much longer than it should."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import rwkv_cli
from rwkv_cli.engine import pacing
from rwkv_cli.engine.completion import Completion, Request
from rwkv_cli.engine.pacing import paced
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.kernels.cpu import backend

VERSIONS = ["4", "5.0", "5.1", "5.2", "6", "7"]


@pytest.mark.parametrize("quant", ["int8", "none"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_cuts_change_no_bit(
    version: str, quant: str, converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rwkv_cli.load(converted(version, quant))
    ids = np.random.default_rng(1).integers(1, model.config.vocab, 530).tolist()
    whole = model.new_state()
    wanted = model.advance(ids, whole)
    for lengths in ([1], [6, 7, 12, 24, 1, 252], [5, 3, 250], [252]):

        def cut(tokens: int, _model: object, lengths: list[int] = lengths) -> Iterator[slice]:
            at = i = 0
            while at < tokens:
                yield slice(at, min(at + lengths[i % len(lengths)], tokens))
                at, i = at + lengths[i % len(lengths)], i + 1

        monkeypatch.setattr("rwkv_cli.engine.completion.paced", cut)
        completion = Completion(model, model.new_state(), Sampler(Sampling(), 0), Request(ids, 1))
        steps, logits = completion.steps(), None
        part = next(steps)
        while completion.result.prompt_tokens + len(part) < len(ids):
            part = steps.send(model.advance(part, completion.state))
        logits = model.advance(part, completion.state)
        assert np.array_equal(logits, wanted)
        for name, array in completion.state.arrays().items():
            assert np.array_equal(array, whole.arrays()[name]), name


@pytest.mark.parametrize(("rate", "longest"), [(5.5, 4), (32, 24), (200, 156), (10_000, backend.chunk)])
def test_parts_take_less_than_a_second(
    rate: float, longest: int, byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that reads `rate` tokens a second, and needs a millisecond more for each part."""
    now, parts = 0.0, []
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    for part in paced(2000, rwkv_cli.load(byte_model)):
        begin = now
        now += (part.stop - part.start) / rate + 0.001
        parts.append((part, now - begin))
    assert [t for part, _ in parts for t in range(part.start, part.stop)] == list(range(2000))
    assert max(part.stop - part.start for part, _ in parts[1:]) == longest
    assert parts[0][0] == slice(0, 6)
    assert max(seconds for _, seconds in parts[1:]) <= pacing._SECONDS + 0.01


def test_a_device_whose_bits_depend_on_the_cuts_gets_whole_passes(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rwkv_cli.load(byte_model)
    monkeypatch.setattr(model.backend, "any_split", False)
    assert list(paced(300, model)) == [slice(0, backend.chunk), slice(backend.chunk, 300)]
