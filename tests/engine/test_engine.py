"""The loop that makes text, on a model whose tokens are known beforehand."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import rwkv_cli
from rwkv_cli.engine.completion import Completion, Request, first_stop, held_back
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.engine.tokenizer import WorldTokenizer
from rwkv_cli.errors import FormatError, TokenizerError

GREEDY = Sampling(0.0, presence_penalty=0.0, frequency_penalty=0.0)
WORDS = [
    "hello",
    " world",
    "\n\n",
    "\nBob",
    ":",
    "\n",
    "a\n",
    "\nBob:",
    "one\n\nBob: two",
    "é",
    "ab",
    "a\n\nb",
    "世",
    " User",
]
HALVES = [b"\xe4\xb8", b"\x96", b"\xf0\x9f\x91", b"\xa9\n\n", b"\xff", b"x\xe4"]
TABLE = [b"", *(bytes([i]) for i in range(256)), *map(str.encode, WORDS), *HALVES, b""]
TOKENIZER = WorldTokenizer(TABLE)
NOTHING = len(TABLE) - 1
"""An id without a token."""


def ids(*parts: str | bytes) -> list[int]:
    """A token for each part."""
    return [TABLE.index(part.encode() if isinstance(part, str) else part) for part in parts]


@dataclass
class Read:
    """A state that is the list of the ids read."""

    ids: list[int] = field(default_factory=list)

    def clone(self) -> "Read":
        return Read(list(self.ids))


@dataclass
class Scripted:
    """A model whose likeliest tokens after the prompt are `script`, one after the other, then 0."""

    script: list[int]
    prompt: list[int] = field(default_factory=lambda: [5, 6, 7])
    text_tokenizer: Any = TOKENIZER
    ends: tuple[int, ...] = (0,)
    path: Path = Path("scripted")
    calls: list[int] = field(default_factory=list)
    end: float = 0.0
    backend: Any = field(default_factory=lambda: SimpleNamespace(chunk=12))

    def advance(self, tokens: list[int], state: Read, watch: Any = None) -> np.ndarray:
        self.calls.append(len(tokens))
        if watch is not None:
            watch(len(tokens))
        state.ids += tokens
        made = len(state.ids) - len(self.prompt)
        logits = np.full(len(TABLE), -5.0, np.float32)
        logits[self.script[made] if 0 <= made < len(self.script) else 0] = 5.0
        logits[1] += self.end if made == len(self.script) else 0.0
        return logits


def run(
    model: Scripted, stops: tuple[str, ...] = (), n: int = 1000, eos: bool = False, cancel: int | None = None
) -> Any:
    """Make a text: its result, state and pieces, after a check of what must hold of every one."""
    request = Request(model.prompt, n, stops, eos)
    completion = Completion(model, Read(), Sampler(GREEDY, 0), request)  # type: ignore[arg-type]
    pieces: list[str] = []
    for piece in completion.stream():
        assert piece
        pieces.append(piece)
        if cancel is not None and len(pieces) >= cancel:
            completion.cancel()
    text = "".join(pieces)
    assert text == completion.result.text
    state: Any = completion.state
    assert state.ids[: len(model.prompt)] == model.prompt
    assert TOKENIZER.decode(state.ids[len(model.prompt) :]) + completion.result.unread == text
    assert not any(stop in text for stop in stops)
    return completion.result, state, pieces


@pytest.mark.parametrize(
    ("script", "stops", "pieces", "stop"),
    [
        (ids("hello", " world"), (), ["hello", " world"], "eos"),
        ([], (), [], "eos"),
        (ids("hello", "\n\n", "ab"), ("\n\n",), ["hello"], "stop"),
        (ids("hello", "\n", "\n", "ab"), ("\n\n",), ["hello"], "stop"),
        (ids("hello", "a\n\nb", "ab"), ("\n\n",), ["hello", "a"], "stop"),
        (ids("one\n\nBob: two"), ("\nBob:", "\n\n"), ["one"], "stop"),
        (ids("hello", "\nBob", ":", "ab"), ("\n\n", "\nBob:"), ["hello"], "stop"),
        (ids("hello", "\nBob", " world"), ("\n\n", "\nBob:"), ["hello", "\nBob world"], "eos"),
        (ids("hello", "\n", "\nBob:"), ("\n\n", "\nBob:"), ["hello"], "stop"),
        (ids("a\n", "ab"), ("\n\n",), ["a", "\nab"], "eos"),
        (ids("hello", "\n"), ("\n\n",), ["hello", "\n"], "eos"),
        (ids("hello", "a\n"), ("\n\n", "\nBob:"), ["hello", "a", "\n"], "eos"),
        (ids("\n\n"), ("\n\n",), [], "stop"),
        # a longer stop text fails, but another starts inside it
        (ids("\n", "\nBob", ":"), ("\n\nBo!", "\nBob:"), ["\n"], "stop"),
        (ids("a", "a", "b", "c"), ("aab",), [], "stop"),
        (ids("a", "a", "a", "b", "c"), ("aab",), ["a"], "stop"),
        (ids("h", "é", b"\xe4\xb8", b"\x96", "o"), (), ["h", "é", "世", "o"], "eos"),
        (ids("h", b"\xe4\xb8"), (), ["h", "�"], "eos"),
        (ids("h", b"\xe4\xb8", "o"), (), ["h", "�o"], "eos"),
        (ids("h", b"\xf0\x9f\x91", b"\xa9\n\n"), ("\n\n",), ["h", "👩"], "stop"),
        (ids("h", "世"), ("世",), ["h"], "stop"),
        ([*ids("h"), NOTHING, *ids("é")], (), ["h", "é"], "eos"),
    ],
)  # fmt: skip
def test_text_and_stop(script: list[int], stops: tuple[str, ...], pieces: list[str], stop: str) -> None:
    result, _, got = run(Scripted(script), stops)
    assert got == pieces
    assert result.stop == stop


@pytest.mark.parametrize(
    ("script", "n", "text", "unread"),
    [
        (ids("hello", " world", "ab"), 2, "hello world", " world"),
        (ids("hello", " world"), 1, "hello", "hello"),
        (ids("hello", "\n"), 2, "hello\n", "\n"),
        (ids("hello", "\n", "ab"), 3, "hello\nab", "ab"),
        # the state must not have read half of what is unread
        (ids("h", b"\xe4\xb8", b"\x96", "o"), 3, "h世", "世"),
        (ids("h", b"\xe4\xb8", b"\x96", "o"), 2, "h�", "�"),
        (ids("h", "x", b"\xf0\x9f\x91", b"\x96"), 3, "hx�", "�"),
        (ids("h", "\n", b"\xe4\xb8", "x"), 3, "h\n�", "�"),
    ],
)
def test_the_last_token_is_not_read(script: list[int], n: int, text: str, unread: str) -> None:
    result, _, _ = run(Scripted(script), ("\n\n",), n)
    assert (result.text, result.unread, result.stop) == (text, unread, "length")
    assert result.tokens == n


def test_an_end_in_the_middle_of_a_character_takes_the_state_back() -> None:
    result, state, _ = run(Scripted(ids("h", "x", b"\xe4\xb8")))
    assert (result.text, result.unread, result.stop) == ("hx�", "�", "eos")
    assert state.ids[3:] == ids("h", "x")


def test_the_state_has_read_nothing_of_a_stop_text() -> None:
    result, state, _ = run(Scripted(ids("hello", "a\n", "\nBob", ":", "ab")), ("\n\nBob:",))
    assert (result.text, result.unread) == ("helloa", "a")
    assert state.ids[3:] == ids("hello")


def test_what_was_held_back_but_is_text_is_read_once() -> None:
    result, state, _ = run(Scripted(ids("hello", "\n", "ab", " world")), ("\n\n",))
    assert result.unread == ""
    assert state.ids[3:] == ids("hello", "\n", "ab", " world")


def test_the_end_token_can_be_ignored() -> None:
    model = Scripted(ids("hello"), end=5.0)  # next best after the end token: byte 0
    result, state, _ = run(model, n=3, eos=True)
    assert (result.text, result.stop) == ("hello\0\0", "length")
    assert 0 not in state.ids
    assert run(Scripted(ids("hello"), end=5.0))[0].text == "hello"


@pytest.mark.parametrize("cancel", [1, 2])
def test_a_cancelled_text_ends_after_the_token_in_work(cancel: int) -> None:
    result, _, pieces = run(Scripted(ids("hello", " world", b"\xe4\xb8", "ab", "ab")), cancel=cancel)
    assert pieces[:cancel] == ["hello", " world"][:cancel]
    assert (result.stop, result.tokens) == ("interrupted", cancel)
    assert result.unread == ""


def test_cancelled_in_the_middle_of_a_character() -> None:
    model = Scripted(ids("h", b"x\xe4", "ab"))
    result, _, _ = run(model, cancel=2)
    assert (result.text, result.unread, result.stop) == ("hx�", "x�", "interrupted")


def test_a_long_prompt_is_read_in_chunks_and_can_be_cancelled() -> None:
    prompt = [9] * 27
    model = Scripted(ids("ab"), prompt)
    result, _, _ = run(model)
    assert model.calls == [12, 12, 3, 1]
    assert (result.prompt_tokens, result.tokens, result.text) == (len(prompt), 2, "ab")
    assert min(result.prompt_seconds, result.seconds) > 0
    stopped = Completion(model, Read(), Sampler(GREEDY, 0), Request(prompt, 5))  # type: ignore[arg-type]
    stopped.cancel()
    assert list(stopped.stream()) == []
    assert (stopped.result.prompt_tokens, stopped.result.stop) == (0, "interrupted")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_output_that_is_not_finite_is_refused(bad: float) -> None:
    model = Scripted(ids("ab", "ab"), end=bad)
    with pytest.raises(FormatError, match="scripted: the model's output is not finite; convert it again"):
        run(model)


parts = st.lists(st.sampled_from([*WORDS, *HALVES, "a", "b", "\n"]), max_size=12).map(lambda found: ids(*found))
stop_texts = st.lists(st.sampled_from(["\n\n", "\nBob:", "ab", "aab", "\n\nUser:", "世", "b\n"]), max_size=3).map(tuple)


@settings(max_examples=100, deadline=None)
@given(script=parts, stops=stop_texts, n=st.integers(1, 14), cancel=st.none() | st.integers(1, 5))
def test_any_text_is_cut_where_the_first_stop_text_is(
    script: list[int], stops: tuple[str, ...], n: int, cancel: int | None
) -> None:
    result, _, _ = run(Scripted(script), stops, n, cancel=cancel)  # which checks text, unread and state
    stream, made, want, stop = TOKENIZER.stream(), "", None, "length" if n <= len(script) else "eos"
    for token in script[:n]:
        made += stream.push(token)
        found = [at for at in map(made.find, stops) if at >= 0]
        if found:
            want, stop = made[: min(found)], "stop"
            break
    want = made + stream.flush() if want is None else want
    if result.stop == "interrupted":
        assert result.text == TOKENIZER.decode(script[: result.tokens])
    else:
        assert (result.text, result.stop) == (want, stop)


@pytest.fixture
def world(converted: Any, rwkv: Any, tmp_path: Path) -> Path:
    """A converted model with a World tokenizer of its own."""
    lines = [f"{i} {token!r} {len(token)}" for i, token in enumerate(TABLE) if token]
    (tmp_path / "vocabulary").write_text("\n".join(lines))
    path = tmp_path / "world"
    assert rwkv("convert", converted().with_suffix(".pth"), path, "--tokenizer", tmp_path / "vocabulary").exit_code == 0
    return path


def test_a_tokenizer_comes_with_its_model(world: Path, converted: Any) -> None:
    model = rwkv_cli.load(world)
    assert model.text_tokenizer.encode("one\n\nBob: two hello") == TOKENIZER.encode("one\n\nBob: two hello")
    assert model.text_tokenizer.size == NOTHING
    without = rwkv_cli.load(converted())
    assert without.tokenizer is None
    with pytest.raises(
        TokenizerError, match=r"safetensors: has no tokenizer, .*; convert it again with --tokenizer PATH$"
    ):
        _ = without.text_tokenizer


@pytest.mark.parametrize(
    ("kind", "arrays", "says"),
    [
        ("odd", {}, "has a tokenizer of unknown kind 'odd'; upgrade rwkv-cli"),
        ("world", {"tokenizer.bytes": np.zeros(9, np.uint8)}, "its tokenizer is damaged (its token lengths"),
        ("world", {"tokenizer.lengths": np.zeros((), np.uint8)}, "its tokenizer is damaged (its token lengths"),
        ("json", {}, "tensor tokenizer.json is missing; convert the model again"),
        ("json", {"tokenizer.json": np.zeros(9, np.uint8)}, "its tokenizer is damaged (tokenizer.json: not"),
        ("world", {"tokenizer.bytes": np.arange(512).astype("u1"), "tokenizer.lengths": np.ones(512, "u1")},
         "its tokenizer has more tokens than the model; convert it again"),
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_is_refused(world: Path, tmp_path: Path, kind: str, arrays: Any, says: str) -> None:
    with safe_open(world, "np") as file:
        metadata = file.metadata()
    save_file(load_file(world) | arrays, tmp_path / "damaged", metadata | {"tokenizer": f'"{kind}"'})
    with pytest.raises(FormatError) as error:
        rwkv_cli.load(tmp_path / "damaged")
    assert str(error.value).startswith(f"{tmp_path / 'damaged'}: {says}")


def test_stop_texts_are_looked_for() -> None:
    assert first_stop("a\n\nBob:", ("Bob:", "\n\n")) == 1
    assert first_stop("abc", ("x",)) is None
    assert held_back("a\n", ("\n\n", "\nBob:")) == 1
    assert held_back("a\nBob", ("\n\n", "\nBob:")) == 4
    assert held_back("abc", ("abc",)) == 0
    assert held_back("", ("abc",)) == 0


def test_only_what_a_stop_text_can_reach_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []

    def search(text: str, stops: tuple[str, ...]) -> int | None:
        searched.append(len(text))
        return first_stop(text, stops)

    monkeypatch.setattr("rwkv_cli.engine.completion.first_stop", search)
    result, _, pieces = run(Scripted(ids(*["hello", "\n", "ab"] * 300)), ("\n\nBob:", "abab"), 900)
    assert result.text == "".join(pieces) == "hello\nab" * 300
    assert len(searched) == 900
    assert max(searched) <= len("\nab" + "hello")


@pytest.mark.parametrize("name", ["a/b", "\\u0000", "x" * 300])
def test_an_unknown_quantization_is_refused(world: Path, tmp_path: Path, name: str) -> None:
    with safe_open(world, "np") as file:
        metadata = file.metadata()
    save_file(load_file(world), tmp_path / "odd", metadata | {"quantization": f'"{name}"'})
    with pytest.raises(FormatError, match="which is unknown; upgrade rwkv-cli"):
        rwkv_cli.load(tmp_path / "odd")
