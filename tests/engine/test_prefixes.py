"""States after texts that were read before: which one is found, and how many are kept."""

import threading
from pathlib import Path

import numpy as np
import pytest

from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.prefixes import Bounds, ModelPrefixes, Prefixes


@pytest.fixture(scope="module")
def model(byte_model: Path) -> LanguageModel:
    return LanguageModel.load(byte_model)


def keep_all(known: ModelPrefixes, model: LanguageModel, texts: list[bytes]) -> None:
    for text in texts:
        known.keep(list(text), model.forward(list(text))[1])


def test_the_longest_prefix_is_found(model: LanguageModel) -> None:
    known = ModelPrefixes(Prefixes(Bounds(memory=1 << 26)), model)
    assert known.find(list(b"abc")) == (known.find(list(b"x"))[0], 0)
    keep_all(known, model, [b"a", b"ab", b"abce", b"abd", b"b", b"abcdzz"])
    for text, length in ((b"abcd", 2), (b"abcef", 4), (b"abc", 2), (b"ab", 1), (b"a", 0), (b"zz", 0), (b"abcdzzz", 6)):
        state, found = known.find(list(text))
        assert found == length
        np.testing.assert_array_equal(
            state.wkv, model.forward(list(text[:length]))[1].wkv if length else model.new_state().wkv
        )
    assert [known.shared(list(text)) for text in (b"abcx", b"abcdzy", b"q", b"ab")] == [3, 5, 0, 2]


def test_states_are_kept_within_bounds(model: LanguageModel, tmp_path: Path) -> None:
    size = sum(array.nbytes for array in model.new_state().arrays().values()) + 100
    texts = [bytes([97 + i]) * 9 for i in range(12)]
    bounds = Bounds(memory=3 * size, disk=6 * size, folder=tmp_path / "states")
    prefixes = Prefixes(bounds)
    known = ModelPrefixes(prefixes, model)
    for text in texts:
        keep_all(known, model, [text])
        while prefixes._tasks.qsize():
            threading.Event().wait(0.01)
    assert prefixes.memory <= 3 * size
    prefixes.close()
    files = list((tmp_path / "states").iterdir())
    assert 3 <= len(files) <= 6
    assert sum(file.stat().st_size for file in files) <= 6 * size
    again = ModelPrefixes(Prefixes(bounds), model)
    found = [text for text in texts if again.find(list(text + b"!"))[1] == 9]
    assert set(texts[-3:]) <= set(found), "the last used ones stay"
    assert len(found) == len(files)
    state, _ = again.find(list(found[0] + b"!"))
    np.testing.assert_array_equal(state.wkv, model.forward(list(found[0]))[1].wkv)


def test_a_damaged_or_missing_file_is_no_state(model: LanguageModel, tmp_path: Path) -> None:
    bounds = Bounds(memory=1 << 20, disk=1 << 20, folder=tmp_path)
    prefixes = Prefixes(bounds)
    keep_all(ModelPrefixes(prefixes, model), model, [b"abc", b"abcd", b"ab"])
    prefixes.close()
    again = ModelPrefixes(Prefixes(bounds), model)
    one, other, _ = sorted(tmp_path.iterdir(), key=lambda path: -path.stat().st_mtime_ns)
    one.unlink()
    other.write_bytes(b"nothing")
    assert again.find(list(b"abcde"))[1] in (2, 3, 4)
    (tmp_path / "other.safetensors").write_bytes(b"x")
    assert len(list(tmp_path.iterdir())) <= 3
    Prefixes(bounds).close()
