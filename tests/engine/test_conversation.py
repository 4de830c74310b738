"""A conversation: how templates write turns, and the states between them."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from naive import error_ratio
from talking import said, talk

import rwkv_cli
from rwkv_cli.engine.conversation import Conversation, Snapshot, Turn, markdown
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.engine.templates import TEMPLATES, Template, parts, recognize
from rwkv_cli.errors import ConversationError
from rwkv_cli.models import Model

GREETING = (
    "User: hi\n\nAssistant: Hi. I am your assistant and I will provide expert full response in full details. "
    "Please feel free to ask any question and I will always answer it.\n\n"
)


@pytest.mark.parametrize(
    ("name", "opening", "turn"),
    [
        ("world", GREETING, "User: a\nb\n\nAssistant:"),
        ("g1", "", "User: a\nb\n\nAssistant:"),
        ("raven", "", "Bob: a\nb\n\nAlice:"),
        ("qa", "\n", "Q: a\nb\n\nA:"),
        ("plain", "", "User: a\nb\n\nAssistant:"),
    ],
)
@pytest.mark.parametrize("text", ["a\nb", "  a\n\n\nb\n", "a\r\nb", "a\r\n\r\nb\r\n"])
def test_templates_write_a_turn(name: str, opening: str, turn: str, text: str) -> None:
    template = TEMPLATES[name]
    assert (template.opening, template.prompt(text)) == (opening, turn)
    assert template.prompt("{text} {0} %s") == template.turn.replace("{text}", "{text} {0} %s")
    assert all(stop not in template.prompt(text).split(":", 1)[1][: len("a b")] for stop in template.stops)


def test_templates_sample_as_their_authors() -> None:
    assert TEMPLATES["world"].sampling == Sampling(1.0, 0.3, presence_penalty=0.5, frequency_penalty=0.5)
    assert TEMPLATES["raven"].sampling == Sampling(1.2, 0.5, presence_penalty=0.4, frequency_penalty=0.4)


@pytest.mark.parametrize(
    ("name", "tokenizer", "vocab", "want"),
    [
        ("RWKV-4-Raven-7B-v11-Eng99%-Other1%-20230427-ctx8192.pth", "json", 50277, "raven"),
        ("RWKV-4-Pile-169M-20220807-8023.pth", "json", 50277, "qa"),
        ("RWKV-4-World-0.1B-v1-20230520-ctx4096.pth", "world", 65536, "world"),
        ("RWKV-5-World-1B5-v2-20231025-ctx4096.pth", "world", 65536, "world"),
        ("RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth", "world", 65536, "world"),
        ("RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth", "world", 65536, "world"),
        ("rwkv7-g1-0.1b-20250307-ctx4096.pth", "world", 65536, "g1"),
        ("rwkv7-g1a-0.4b-20250905-ctx4096.pth", "world", 65536, "g1"),
        ("rwkv7-g0-7.2b-20250722-ctx4096.pth", "world", 65536, "g1"),
        ("RWKV-x070-Pile-168M-20241120-ctx4096.pth", "json", 50304, "qa"),
        ("big1-model.pth", "bytes", 256, "plain"),
        ("model.pth", None, 300, "plain"),
    ],
)
def test_the_template_is_guessed_from_official_names(name: str, tokenizer: str | None, vocab: int, want: str) -> None:
    assert recognize(name, tokenizer, vocab).name == want


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize("stops", [("\n\n",), ("\nab", "aab"), ("\n b", "\n\n", "b")])
@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_state_has_read_the_transcript(byte_model: Path, stops: tuple[str, ...], n: int, seed: int) -> None:
    model = rwkv_cli.load(byte_model)
    template = Template("x", "Q: {text}\n\nA:", stops, Sampling(1.5 + seed, 1.0), "opening\n")
    conversation, transcript = talk(model, template, template.sampling, n, "Hi", "Three\n\ndays", "é")
    rest = conversation.now.unread.encode()
    assert transcript.encode().endswith(rest)
    got, state = model.forward(list(rest), conversation.now.state)
    want, whole = model.forward(list(transcript.encode()))
    assert error_ratio(got, want) < 1e-5
    assert error_ratio(state.wkv, whole.wkv) < 1e-5


def same(a: Snapshot, b: Snapshot) -> bool:
    arrays = zip(a.state.arrays().values(), b.state.arrays().values(), strict=True)
    return all(np.array_equal(x, y) for x, y in arrays) and (a.unread, a.random) == (b.unread, b.random)


def test_reset_forgets(byte_model: Path) -> None:
    model, template = rwkv_cli.load(byte_model), TEMPLATES["world"]
    conversation, _ = talk(model, template, template.sampling, 9, "Hi")
    assert said(conversation.reply("again")) != said(conversation.reply("again"))
    conversation.reset()
    fresh = Conversation(model, template, template.sampling, 5, 9)
    assert same(conversation.now, fresh.now)
    assert (conversation.now.unread, conversation.turns) == (GREETING, [])
    assert said(conversation.reply("Hi")) == said(fresh.reply("Hi"))


def test_undo_is_exact(byte_model: Path) -> None:
    model, settings = rwkv_cli.load(byte_model), Sampling(top_p=1.0)
    straight, _ = talk(model, TEMPLATES["plain"], settings, 9, "one", "two", "three")
    detour, _ = talk(model, TEMPLATES["plain"], settings, 9, "one", "a detour", "and on")
    assert [detour.undo().user, detour.undo().user] == ["and on", "a detour"]
    for turn in ("two", "three"):
        said(detour.reply(turn))
    assert [turn.answer for turn in detour.turns] == [turn.answer for turn in straight.turns]
    assert same(detour.now, straight.now)
    for _ in range(3):
        detour.undo()
    assert same(detour.now, Conversation(model, TEMPLATES["plain"], settings, 5, 9).now)
    with pytest.raises(ConversationError, match="no turn yet"):
        detour.undo()


def test_retry_differs_and_repeats(byte_model: Path) -> None:
    model, settings = rwkv_cli.load(byte_model), Sampling(top_p=1.0)
    answers = []
    for _ in range(2):
        conversation, _ = talk(model, TEMPLATES["plain"], settings, 9, "one", "two")
        before = conversation.turns[-1].before
        answers.append([conversation.turns[-1].answer])
        for _ in range(2):
            said(conversation.retry())
            assert [turn.user for turn in conversation.turns] == ["one", "two"]
            assert conversation.turns[-1].before is before
            answers[-1].append(conversation.turns[-1].answer)
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 3


@pytest.mark.parametrize("bound", ["_SNAPSHOT_BYTES", "_SNAPSHOTS"])
def test_old_snapshots_are_given_up(byte_model: Path, monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    model = rwkv_cli.load(byte_model)
    size = sum(array.nbytes for array in model.new_state().arrays().values())
    monkeypatch.setattr(f"rwkv_cli.engine.conversation.{bound}", 2 if bound == "_SNAPSHOTS" else 2 * size)
    conversation, _ = talk(model, TEMPLATES["plain"], Sampling(), 3, "a", "b", "c", "d")
    assert [turn.before is None for turn in conversation.turns] == [True, True, False, False]
    conversation.undo()
    conversation.undo()
    # what was said is read once more
    read: list[int] = []

    @contextmanager
    def bar(tokens: int) -> Iterator[Callable[[int], object]]:
        read.append(tokens)
        yield read.append

    conversation.recall(bar)
    assert read[0] == read[-1] > 0
    conversation.undo()
    text = "".join(turn.written(TEMPLATES["plain"]) for turn in conversation.turns)
    assert [turn.user for turn in conversation.turns] == ["a"]
    _, whole = model.forward(list(text.encode()))
    assert error_ratio(conversation.now.state.wkv, whole.wkv) < 1e-5
    assert conversation.now.unread == "\n\n"
    conversation.undo()
    assert same(conversation.now, Conversation(model, TEMPLATES["plain"], Sampling(), 5, 3).now)


def test_a_recall_that_is_given_up_changes_nothing(byte_model: Path) -> None:
    conversation, _ = talk(rwkv_cli.load(byte_model), TEMPLATES["plain"], Sampling(), 5, "x" * 1000, "b")
    conversation.turns[1].before = None

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.recall(lambda _: nullcontext(interrupted))
    assert conversation.turns[1].before is None
    conversation.turns[0].before = None
    said(conversation.retry())
    assert [turn.user for turn in conversation.turns] == ["x" * 1000, "b"]


def test_a_turn_interrupted_before_it_was_read_never_happened(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rwkv_cli.load(byte_model)
    conversation, _ = talk(model, TEMPLATES["plain"], Sampling(), 5, "Hi")
    before = conversation.now
    reply = conversation.reply("x" * 1000)
    advance = Model.advance

    def interrupted(*args: Any, **options: Any) -> Any:
        reply.completion.cancel()
        return advance(*args, **options)

    monkeypatch.setattr(type(model), "advance", interrupted)
    assert list(reply.stream()) == []
    assert conversation.now is before
    assert len(conversation.turns) == 1
    monkeypatch.undo()
    again, _ = talk(model, TEMPLATES["plain"], Sampling(), 5, "Hi")
    assert same(conversation.now, again.now)


def test_a_retry_interrupted_while_it_reads_changes_nothing(byte_model: Path) -> None:
    conversation, _ = talk(rwkv_cli.load(byte_model), TEMPLATES["plain"], Sampling(), 5, "one", "two")
    before, turns = conversation.now, list(conversation.turns)
    for reply in (conversation.retry(), conversation.reply("three", again=True)):
        reply.completion.cancel()
        assert list(reply.stream()) == []
        assert conversation.now is before
        assert conversation.turns == turns


def test_a_new_seed_outlives_undo(byte_model: Path) -> None:
    model, settings = rwkv_cli.load(byte_model), Sampling(top_p=1.0)
    conversation, _ = talk(model, TEMPLATES["plain"], settings, 9, "one")
    conversation.set_seed(9)
    conversation.undo()
    assert said(conversation.reply("two")) == said(Conversation(model, TEMPLATES["plain"], settings, 9, 9).reply("two"))


@pytest.mark.parametrize(
    ("mode", "prompt"),
    [
        ("off", "User: a\n\nAssistant:"),
        ("on", "User: a\n\nAssistant: <think"),
        ("short", "User: a (think a bit)\n\nAssistant: <think"),
        ("long", "User: a (think a lot)\n\nAssistant: <think"),
        ("fast", "User: a\n\nAssistant: <think>\n</think"),
    ],
)
def test_think_modes_are_the_models(mode: str, prompt: str) -> None:
    assert TEMPLATES["g1"].prompt("a", mode) == prompt


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>\nhm </ok>\n\nwell\n</think>\n\nHello <b>", "hm </ok>\n\nwell", "Hello <b>"),
        ("<think></think>Hi", "", "Hi"),
        (" <think>\n</think>\nHi", "", "Hi"),
        ("<think>cut </thi", "cut </thi", ""),
        ("<thi", "", "<thi"),
        (" \nno <think>x</think> y ", "", "no <think>x</think> y "),
        ("", "", ""),
    ],
)
def test_reasoning_is_told_apart(text: str, thought: str, answer: str, size: int) -> None:
    pieces = list(parts(text[i : i + size] for i in range(0, len(text), size)))
    assert all(piece for _, piece in pieces)
    assert "".join(piece for thinking, piece in pieces if thinking) == thought
    assert "".join(piece for thinking, piece in pieces if not thinking) == answer
    assert [thinking for thinking, _ in pieces] == sorted((thinking for thinking, _ in pieces), reverse=True)


def test_reasoning_is_not_in_the_shown_answer() -> None:
    turn = Turn("a", "<think>b</think>\n\nc", None)
    assert turn.shown() == "c"
    assert markdown("m", [turn]) == "# Chat with m\n\n**You:** a\n\nc\n\n"


class Pile:
    """A vocabulary like GPT-NeoX's: a blank line is a token of its own."""

    def encode(self, text: str) -> list[int]:
        return [535 if piece == "\n\n" else ord(piece) for piece in re.findall(r"\n\n|.|\n", text)]


@pytest.mark.parametrize(("template", "want"), [("raven", [97, 10, 10, 98]), ("plain", [97, 535, 98])])
def test_blank_lines_are_what_the_model_knows(byte_model: Path, template: str, want: list[int]) -> None:
    model = rwkv_cli.load(byte_model)
    conversation = Conversation(model, TEMPLATES[template], Sampling(), 1)
    model.tokenizer = Pile()  # type: ignore[assignment]
    assert conversation.encode("a\n\nb") == want


def test_a_system_text_comes_first() -> None:
    assert TEMPLATES["world"].begin("") == GREETING
    assert TEMPLATES["world"].begin("Be\n\nbrief. ") == "System: Be\nbrief.\n\n"
    assert TEMPLATES["raven"].begin("x {y}") == "x {y}\n\n"


def test_penalties_are_for_one_answer(byte_model: Path) -> None:
    template = TEMPLATES["world"]
    conversation, _ = talk(rwkv_cli.load(byte_model), template, template.sampling, 9, "Hi")
    assert conversation.sampler.counts
    conversation.reply("again")
    assert not conversation.sampler.counts
