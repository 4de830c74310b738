"""Texts whose passes read guesses ahead: the same as without, whoever guesses and however wrong."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from rwkv_cli.engine.completion import Completion, Request
from rwkv_cli.engine.drafting import DraftModel, PromptLookup
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.engine.speculation import Pace, Speculation
from rwkv_cli.errors import DeviceError, DraftError, FormatError
from rwkv_cli.models import State

GREEDY = Sampling(temperature=0, presence_penalty=0, frequency_penalty=0)
PROMPT = [*b"Once upon a time"]


class Prophet:
    """Knows the text, and says the wrong thing now and then."""

    patience = 1

    def __init__(self, text: Sequence[int], rng: np.random.Generator, wrong: float) -> None:
        self.text, self.rng, self.wrong, self.at = text, rng, wrong, 0

    def begin(self, ids: Sequence[int]) -> None:
        """Nothing: it knows where the text begins."""

    def read(self, ids: Sequence[int]) -> None:
        assert list(ids) == list(self.text[self.at : self.at + len(ids)])
        self.at += len(ids)

    def guess(self, most: int, sampler: Sampler) -> list[int]:
        before = sampler.random, sampler.counts
        sure = [token ^ (self.rng.random() < self.wrong) for token in self.text[self.at : self.at + most]]
        assert (sampler.random, sampler.counts) == before
        return sure

    def mark(self) -> None:
        """Nothing."""

    def go_back(self, mark: State | None) -> None:
        """Nothing."""


def made(
    model: LanguageModel, settings: Sampling, speculation: Speculation | None, stops: Sequence[str] = (), n: int = 30
) -> tuple[Any, ...]:
    """What a text is and leaves behind: its tokens' text, its end, its state, and the sampler's next random number."""
    sampler = Sampler(settings, 5)
    begin = model.new_state()
    request = Request(PROMPT, n, stops, ignore_eos=True)
    completion = Completion(model, begin, sampler, request, speculation=speculation)
    "".join(completion.stream())
    result, state = completion.result, completion.state
    numbers = {name: array.tobytes() for name, array in state.arrays().items()}
    assert all(array.base is None for array in state.arrays().values()), "a view of memory that changes"
    return result.text, list(result.unread_ids), result.tokens, result.stop, numbers, sampler.random, sampler.counts


def tokens(model: LanguageModel, settings: Sampling, n: int = 42) -> list[int]:
    """The prompt and the tokens that follow."""
    sampler, state, ids = Sampler(settings, 5), model.new_state(), list(PROMPT)
    logits = model.advance(ids, state)
    for _ in range(n):
        logits = logits.copy()
        logits[list(model.ends)] = -1e30
        ids.append(sampler.sample(logits))
        logits = model.advance(ids[-1:], state)
    return ids


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of every width, at random instead of by their speed."""
    rng = np.random.default_rng(1)
    monkeypatch.setattr(Pace, "best", lambda _: int(rng.choice([0, 1, 3, 7])))


@pytest.mark.usefixtures("widths")
@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("settings", [GREEDY, Sampling()], ids=["greedy", "sampled"])
def test_guesses_change_no_bit(converted: Callable[..., Path], version: str, settings: Sampling) -> None:
    model = LanguageModel.load(converted(version, vocab=256))
    plain, text = made(model, settings, None), tokens(model, settings)
    assert len(set(text[len(PROMPT) :])) > 3, "a text that says nothing"
    for wrong in (0.0, 0.4):
        speculation = Speculation(model, Prophet(text, np.random.default_rng(2), wrong))
        assert made(model, settings, speculation) == plain
    stop = plain[0][9:11]
    stopped = made(model, settings, None, [stop])
    speculation = Speculation(model, Prophet(text, np.random.default_rng(2), 0.3))
    assert made(model, settings, speculation, [stop]) == stopped
    assert stopped[3] == "stop"


def test_the_share_of_right_guesses_is_told(byte_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel.load(byte_model)
    monkeypatch.setattr(Pace, "best", lambda _: 3)
    text = tokens(model, GREEDY)
    for wrong, share in ((0.0, 1.0), (1.0, 0.0)):
        speculation = Speculation(model, Prophet(text, np.random.default_rng(2), wrong))
        request = Request(PROMPT, 41, (), True)
        completion = Completion(model, model.new_state(), Sampler(GREEDY, 5), request, speculation=speculation)
        "".join(completion.stream())
        assert completion.result.drafted >= 27
        assert completion.result.accepted == share * completion.result.drafted


def test_the_pace_follows_what_pays() -> None:
    def usual(share: float, seconds: dict[int, float], guess: float = 0.0) -> int:
        """The number of guesses in most of 300 passes, where so many of 20 guesses are right."""
        pace, chosen, rng = Pace(), list[int](), np.random.default_rng(0)
        for _ in range(300):
            number = pace.best()
            chosen.append(number)
            pace.passed(number, seconds[number])
            if number:
                pace.guessed(number, guess * number)
            pace.came(rng.random() < share)
        return max(chosen, key=chosen[100:].count)

    even = {0: 1.0, 1: 1.0, 3: 1.1, 7: 1.2}
    dear = {0: 1.0, 1: 1.2, 3: 1.5, 7: 4.0}
    by_row = {0: 1.0, 1: 2.0, 3: 4.0, 7: 8.0}
    assert usual(0.95, even) == 7
    assert usual(0.95, by_row) == 0
    assert usual(0.02, dear) == 0
    assert usual(0.95, dear) == 3
    assert usual(0.5, {0: 1.0, 1: 1.1, 3: 2.0, 7: 4.0}) == 1
    assert usual(0.5, even, guess=1.0) == 0


def test_a_slow_first_pass_is_forgotten() -> None:
    pace = Pace()
    pace.passed(0, 1.0)
    for number in (7, 3, 1):
        pace.passed(number, 50.0)
    for _ in range(20):
        pace.came(True)
    assert pace.best() == 0
    for _ in range(2000):
        number = pace.best()
        pace.passed(number, 1.0)
    assert pace.best() == 7


def test_a_text_that_repeats_itself_is_looked_up() -> None:
    lookup, sampler = PromptLookup(), Sampler(GREEDY, 0)
    lookup.read([1, 2, 3, 4, 5, 6, 7])
    assert lookup.guess(3, sampler) == []
    lookup.read([2, 3])
    assert lookup.guess(3, sampler) == [4, 5, 6]
    assert lookup.guess(9, sampler) == [4, 5, 6, 7, 2, 3, 4, 5, 6]
    lookup.read([9, 3])
    assert lookup.guess(3, sampler) == []
    lookup.read([4, 5, 8, 0, 2, 3, 4, 5])  # four tokens that were there tell more than the last two
    assert lookup.guess(2, sampler) == [6, 7]
    lookup.read([1, 1, 1, 1])
    assert lookup.guess(4, sampler) == [1, 1, 1, 1]


@pytest.mark.parametrize("settings", [GREEDY, Sampling()], ids=["greedy", "sampled"])
def test_a_model_guesses_all_of_its_own_text(
    byte_model: Path, settings: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler's copy makes the choices of the sampler."""
    model = LanguageModel.load(byte_model)
    monkeypatch.setattr(Pace, "best", lambda _: 3)
    monkeypatch.setattr(model.backend, "chunk", 7)  # a prompt of several parts
    texts = []
    for speculation in (None, Speculation(model, DraftModel(model, model))):
        sampler, request = Sampler(settings, 5), Request(PROMPT, 40)
        completion = Completion(model, model.new_state(), sampler, request, speculation=speculation)
        texts.append("".join(completion.stream()))
    drafted, accepted = completion.result.drafted, completion.result.accepted
    assert 24 <= drafted - 3 <= accepted  # some may lie behind the text's end
    assert texts[0] == texts[1] != ""


def test_a_draft_goes_back_with_the_chat(byte_model: Path) -> None:
    model = LanguageModel.load(byte_model)
    drafter = DraftModel(model, model)
    drafter.read(PROMPT)
    mark, sampler = drafter.mark(), Sampler(GREEDY, 0)

    def next_ones() -> list[int]:
        drafter.read([65])
        return drafter.guess(5, sampler)

    first = next_ones()
    drafter.read(first[:2])
    drafter.read([1, 2])
    assert drafter.guess(5, sampler) != first
    drafter.go_back(mark)
    assert next_ones() == first
    state = model.new_state()
    ids = [*PROMPT, 65]
    for token in first:
        assert token == int(np.argmax(model.advance(ids, state)))
        ids = [token]


def test_a_draft_needs_the_same_vocabulary(byte_model: Path, rwkv: Any, tmp_path: Path) -> None:
    model = LanguageModel.load(byte_model)
    source = tiny.write_pth(tmp_path / "other.pth", tiny.weights("7", vocab=300), "F32")
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text("1 'a' 1\n2 'b' 1\n")
    path = tmp_path / "other.safetensors"
    assert rwkv("convert", source, path).exit_code == 0
    with pytest.raises(DraftError, match=f"{path}: has another vocabulary than {byte_model}"):
        DraftModel(LanguageModel.load(path), model)
    result = rwkv("generate", "a", "-m", byte_model, "--draft", path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "has another vocabulary" in result.stderr


def test_a_damaged_draft_is_named(byte_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel.load(byte_model)
    drafter = DraftModel(model, model)
    monkeypatch.setattr(model, "advance", lambda *_: np.full(256, np.nan, np.float32))
    drafter.read(PROMPT)
    with pytest.raises(FormatError, match=f"{byte_model}: the model's output is not finite"):
        drafter.guess(3, Sampler(Sampling(), 0))


def test_a_device_that_keeps_no_states_is_refused(byte_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel.load(byte_model)
    monkeypatch.setattr(model.backend, "keeps_states", False)
    with pytest.raises(DeviceError, match="use --device cpu"):
        Speculation(model, PromptLookup())


@pytest.mark.parametrize("guesser", ["--lookup", "--draft"])
def test_commands_make_the_same_text(rwkv: Any, byte_model: Path, guesser: str) -> None:
    option = ["--lookup"] if guesser == "--lookup" else ["--draft", byte_model]
    common = ["-m", byte_model, "--seed", 3]
    plain = rwkv("generate", "Once", *common, "-n", 40, "--ignore-eos")
    ahead = rwkv("generate", "Once", *common, "-n", 40, "--ignore-eos", *option)
    assert ahead.stdout == plain.stdout
    assert "drafted token" in ahead.stderr
    facts = json.loads(rwkv("generate", "Once", *common, "-n", 40, "--ignore-eos", "--json", *option).stdout)
    assert facts["text"] == plain.stdout.removesuffix("\n") or facts["text"] == plain.stdout
    assert 0 <= facts["accepted"] <= facts["drafted"]
    turns = "one\n/retry\n/undo\ntwo\n"
    said = rwkv("chat", *common, "-n", 9, input=turns)
    assert rwkv("chat", *common, "-n", 9, *option, input=turns).stdout == said.stdout != ""


def test_options_that_exclude_each_other(rwkv: Any, byte_model: Path, tmp_path: Path) -> None:
    both = rwkv("generate", "a", "-m", byte_model, "--lookup", "--draft", byte_model)
    assert both.exit_code == 2
    assert "--draft and --lookup exclude each other" in both.stderr
    (tmp_path / "prompts").write_text('{"prompt": "a"}\n')
    batch = rwkv("generate", "--batch", tmp_path / "prompts", "-m", byte_model, "--lookup")
    assert batch.exit_code == 2
    assert "'--lookup' does not go with --batch" in batch.stderr
    missing = rwkv("generate", "a", "-m", byte_model, "--draft", tmp_path / "none")
    assert missing.exit_code == 1
    assert str(tmp_path / "none") in missing.stderr
