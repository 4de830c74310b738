"""rwkv chat in a pipe: its turns, its commands, and what it refuses."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from talking import talk

import rwkv_cli
from rwkv_cli.engine.conversation import Conversation
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.engine.templates import TEMPLATES
from rwkv_cli.models import Model

Run = Callable[..., Result]


@pytest.fixture
def chat(chat: Run) -> Run:
    """A chat whose answers are the same in each run."""
    return partial(chat, "--seed", 5)


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
    assert result.stderr.count("there is no turn yet") == 3
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
