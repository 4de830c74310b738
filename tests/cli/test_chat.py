"""rwkv chat: templates, what the state has read turn after turn, undo and retry, reasoning, commands in a pipe."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from naive import error_ratio

import rwkv_cli
from rwkv_cli.engine.conversation import Conversation, Reply, Snapshot, Turn, markdown
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.engine.templates import TEMPLATES, Template, parts, recognize
from rwkv_cli.errors import ConversationError
from rwkv_cli.models import Model

Run = Callable[..., Result]
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


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model over bytes that has learnt nothing writes mostly what is no text; let it pick from four."""
    sample = Sampler.sample

    def picked(sampler: Sampler, logits: Any) -> int:
        return sample(sampler, np.where([i in b"ab \n" for i in range(256)], logits, -1e30))

    monkeypatch.setattr(Sampler, "sample", picked)


def talk(model: Any, template: Template, settings: Sampling, n: int, *turns: str) -> tuple[Conversation, str]:
    """A conversation after these turns, and all that was said in it."""
    conversation = Conversation(model, template, settings, 5, n)
    transcript = template.opening
    for turn in turns:
        reply = conversation.reply(turn)
        shown = said(reply)
        assert shown == reply.completion.result.text.lstrip()
        transcript += template.prompt(turn) + reply.completion.result.text + template.end
    return conversation, transcript


def said(reply: Reply) -> str:
    """Make an answer, and return it without its reasoning."""
    return "".join(piece for thinking, piece in reply.stream() if not thinking)


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
    with pytest.raises(ConversationError, match="no turn to take back"):
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


@pytest.fixture
def chat(rwkv: Run, byte_model: Path) -> Run:
    """A chat whose turns come through a pipe."""

    def run(*options: object, input: str | bytes = "") -> Result:
        return rwkv("chat", "-m", byte_model, "-n", 12, "--seed", 5, *options, input=input)

    return run


@pytest.mark.usefixtures("letters")
def test_turns_come_through_a_pipe(chat: Run, byte_model: Path) -> None:
    result = chat("--template", "qa", "--top-p", 1, input="Hi\n\n  \nThere")
    template = TEMPLATES["qa"]
    settings = Sampling(top_p=1.0)
    _, transcript = talk(rwkv_cli.load(byte_model), template, settings, 12, "Hi", "There")
    answers = re.split(r"Q: .*\n\nA:", transcript.removeprefix(template.opening))[1:]
    assert result.exit_code == 0
    assert result.stdout == "".join(answer.removesuffix("\n\n").lstrip() + "\n" for answer in answers)


def test_commands(chat: Run) -> None:
    result = chat(input="/help\n/xyz here\n/reset\n/exit\nHi\n")
    assert (result.exit_code, result.stdout) == (0, "")
    lines = result.stderr.splitlines()
    assert lines[0].split() == ["/undo", "take", "the", "last", "turn", "back"]
    assert "/xyz is not a command; /help lists them" in lines
    assert lines[-1] == "This is a new conversation."
    assert chat(input="").stdout == ""
    one = chat(input="/help set\n/help /bye\n/help reste\n/save\n").stderr.splitlines()
    assert [line.split()[0] for line in one[:2]] == ["/set", "/exit"]
    assert one[2:] == ["/reste is not a command; did you mean /reset?", "type it as /save NAME"]
    once, again = chat(input="Hi\n").stdout, chat(input="Hi\n/reset\nHi\n").stdout
    assert once + once == again
    assert chat(input="Hi\nHi\n").stdout != again


def test_names_of_other_programs_are_understood(chat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat(input="/?\n").stderr == chat(input="/help\n").stderr
    for reset in ("/clear", "/new"):
        assert chat(input=f"Hi\n{reset}\nHi\n").stdout == chat(input="Hi\n/reset\nHi\n").stdout
    for leave in ("/bye", "/quit"):
        assert chat(input=f"Hi\n{leave}\nHi\n").stdout == chat(input="Hi\n").stdout
    assert chat(input="Hi\n/regen\n").stdout == chat(input="Hi\n/retry\n").stdout
    assert chat("--seed", 1, input="/show\n").stderr == chat("--seed", 1, input="/params\n").stderr
    assert len(chat(input="exit\n").stdout) > 0  # in a pipe it is a text
    monkeypatch.setattr("rwkv_cli.terminal.repl.is_terminal", lambda: True)
    assert chat(input="exit\nHi\n").stdout == chat(input="quit\n").stdout == ""


def test_undo_retry_and_edit_in_a_pipe(chat: Run) -> None:
    once = chat(input="Hi\n").stdout
    assert chat(input="Hi\n/undo\nHi\n").stdout == once + once
    assert chat(input="Ho\n/edit Hi\n").stdout.endswith(once)
    retried = chat(input="Hi\n/retry\n/retry\n").stdout
    assert retried.startswith(once)
    assert retried != 3 * once
    result = chat(input="/undo\n/retry\n/edit x\n/edit\n")
    assert result.stderr.count("there is no turn to take back") == 3
    assert "give the turn's new text" in result.stderr
    assert chat(input="//undo\n").stdout == chat(input="/undo\n//undo\n").stdout != ""


def test_a_reset_can_be_taken_back(chat: Run) -> None:
    straight = chat(input="Hi\nThere\n").stdout
    for anew in ("/reset", "/system Be brief.", "/reset\nOther\n/undo\n/system x"):
        result = chat(input=f"Hi\n{anew}\n/undo\nThere\n")
        assert "The chat has 1 turn again." in result.stderr
        assert result.stdout.splitlines()[-1] == straight.splitlines()[-1]


def test_a_question_is_answered_once(chat: Run) -> None:
    turn = chat(input="Hi\n").stdout
    assert chat("Hi").stdout == turn
    assert chat("/reset").stdout == chat(input="//reset\n").stdout  # a question is no command
    assert chat("--whole", input="Hi\n").stdout == turn
    letter = "Dear Aunt,\nwe are well.\n"
    asked = chat("Sum up:", input=letter).stdout
    assert asked == chat("Sum up:\n\nDear Aunt,\nwe are well.").stdout
    assert asked == chat("--whole", input=f"Sum up:\n\n{letter}").stdout
    assert asked == chat("Sum up:", "-", input=letter).stdout
    assert asked != chat(input=letter).stdout
    empty = chat(" ", input="\n")
    assert (empty.exit_code, empty.stdout) == (2, "")
    assert "the question is empty" in empty.stderr


def test_settings_change_the_next_answer(chat: Run) -> None:
    greedy = chat("--temperature", 0, "--frequency-penalty", 0, "--presence-penalty", 0, input="Hi\n").stdout
    changed = chat(input="/set temperature 0\n/set frequency_penalty=0\n/set presence-penalty 0\nHi\n")
    assert changed.stdout == greedy
    assert chat("-n", 3, input="Hi\n").stdout == chat(input="/set max_tokens 3\nHi\n").stdout
    assert chat("--seed", 9, input="Hi\n").stdout == chat(input="/set seed 9\nHi\n").stdout
    for wrong in ("temperature -1", "temperature nan", "heat", "heat 3", "top_k 1.5", "seed x"):
        result = chat(input=f"/set {wrong}\nHi\n")
        assert (result.exit_code, result.stdout) == (0, chat(input="Hi\n").stdout)
        assert len(result.stderr.strip().splitlines()) == 1
        assert "range" not in result.stderr or "in the range" in result.stderr
    assert "temperature: 'hot' is not a valid number." in chat(input="/set temperature hot\n").stderr
    assert chat("--seed", 1, input="/set\n").stderr == chat("--seed", 1, input="/params\n").stderr
    assert chat("--top-p", 0.25, input="/set top_p\n/set max-tokens\n").stderr == "top_p 0.25\nmax_tokens 12\n"
    shown = chat(input="/set top_p 0.25\n/params\n").stderr
    assert re.search(r"top_p +0\.25\n", shown)
    assert re.search(r"seed +5\n", shown)


def test_system_and_think(chat: Run) -> None:
    told = chat("--system", "Be brief.", input="Hi\n").stdout
    assert told == chat(input="/system Be brief.\nHi\n").stdout != chat(input="Hi\n").stdout
    assert chat("--system", "Be brief.", input="/system off\nHi\n").stdout == chat(input="Hi\n").stdout
    assert "Be brief." in chat("--system", "Be brief.", input="/system\n").stderr
    result = chat("--think", "on", input="Hi\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "template plain does not reason; --template g1 does" in result.stderr
    modes = {mode: chat("--template", "g1", "--think", mode, input="Hi\n").stdout for mode in ("off", "fast")}
    assert modes["off"] != modes["fast"]
    assert chat("--template", "g1", "--think", "off", input="/think fast\nHi\n").stdout == modes["fast"]
    assert "a is no think mode; there are off, on," in chat("--template", "g1", input="/think a\n").stderr


def test_a_pipe_sees_no_reasoning(chat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(b">hm</think>\n\nok\0")
    monkeypatch.setattr(Sampler, "sample", lambda *_: next(said))
    result = chat("--template", "g1", "-n", 100, input="Hi\n/history\n")
    assert (result.exit_code, result.stdout) == (0, "ok\n> Hi\nok\n\n")


def test_nothing_steers_the_terminal(chat: Run) -> None:
    result = chat("--system", "a\x1b]0;b\x07", input="Hi\x1b[2J\n/undo\n/system\n/xyz\x1b[2J\n/set seed \x1b[2J\n")
    assert result.exit_code == 0
    assert "Hi" in result.stderr
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", result.stderr)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["chat", "generate -n 2"])
def test_closed_streams_are_empty(byte_model: Path, closed: str, command: str) -> None:
    script = f'"{sys.executable}" -m rwkv_cli {command} -m "{byte_model}" {closed}'
    done = subprocess.run(["sh", "-c", script], input=b"Hi\n", capture_output=True, timeout=120)
    assert b"Traceback" not in done.stderr


def test_ctrl_c_ends_a_chat_in_a_pipe(chat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sampler.sample

    def interrupted(*args: Any) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return sample(*args)

    monkeypatch.setattr(Sampler, "sample", interrupted)
    result = chat(input="Hi\nThere\n")
    assert result.exit_code == 1
    assert "Aborted!" in result.stderr


def test_ctrl_c_in_a_prompt_shows_no_answer(chat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Model.advance

    def interrupted(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return advance(*args, **options)

    monkeypatch.setattr(Model, "advance", interrupted)
    monkeypatch.setattr("rwkv_cli.terminal.repl.is_terminal", lambda: True)
    result = chat("--template", "g1", "--think", "on", input="Hi\n/history\n")
    assert result.stdout.strip() == ""
    assert "interrupted; the conversation is as it was" in result.stderr


def test_what_was_said_can_be_had(chat: Run, tmp_path: Path) -> None:
    file = tmp_path / "chat.md"
    answer = chat(input="Hi\n").stdout
    result = chat(input=f"Hi\n/history\n/copy {file}\n/copy {file}\n/copy {tmp_path}/no/where\n/copy\n/stats\n")
    assert result.exit_code == 0
    assert result.stdout == f"{answer}> Hi\n{answer}\n"
    assert file.read_text("utf-8").startswith("# Chat with ")
    assert f"**You:** Hi\n\n{answer.strip()}" in file.read_text("utf-8")
    assert f"{file} exists; name another file" in result.stderr
    assert f"{tmp_path}/no/where: No such file or directory" in result.stderr
    odd = chat(input=f"Hi\n/copy ~nosuchuser/x\n/copy {tmp_path}/a\0b\n/history\n")
    assert odd.exit_code == 0
    assert "~nosuchuser/x: there is no such user; name another file" in odd.stderr
    assert "> Hi" in odd.stdout
    assert (tmp_path / "ab").exists()
    assert re.search(r"turns +1\n", result.stderr)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--template", "none"), 2, "'--template'"),
        (("--max-tokens", 0), 2, "'--max-tokens'"),
        (("-m", "missing.st"), 1, "missing.st: No such file or directory"),
    ],
)
def test_what_is_wrong_is_said(chat: Run, options: tuple[object, ...], code: int, says: str) -> None:
    result = chat(*options, input="Hi\n")
    assert result.exit_code == code
    assert says in result.stderr.splitlines()[-1]


def test_an_unknown_template_in_the_file_is_named(chat: Run, byte_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TEMPLATES, "plain")
    result = chat(input="Hi\n")
    assert result.stderr.splitlines()[-1] == (
        f"Error: {byte_model}: its chat template 'plain' is unknown; choose one with --template"
    )
    assert chat("--template", "qa", input="Hi\n").exit_code == 0


def test_a_turn_that_is_no_token_is_refused(chat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conversation, "encode", lambda *_: [])
    result = chat(input="Hi\n")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "the tokenizer makes nothing of this turn" in result.stderr


def test_output_that_is_not_finite_ends_the_chat(chat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "advance", lambda *_, **__: np.full(256, np.nan, np.float32))
    result = chat(input="Hi\n")
    assert result.exit_code == 1
    assert "the model's output is not finite" in result.stderr.splitlines()[-1]


def test_penalties_are_for_one_answer(byte_model: Path) -> None:
    template = TEMPLATES["world"]
    conversation, _ = talk(rwkv_cli.load(byte_model), template, template.sampling, 9, "Hi")
    assert conversation.sampler.counts
    conversation.reply("again")
    assert not conversation.sampler.counts
