"""Chats kept on disk: resumed bit for bit, never emptied, and listed."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import Result
from talking import begun

import rwkv_cli
from rwkv_cli.engine import sessions
from rwkv_cli.engine.conversation import Conversation
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.engine.sessions import Session
from rwkv_cli.engine.templates import TEMPLATES
from rwkv_cli.models import State

Run = Callable[..., Result]
pytestmark = pytest.mark.usefixtures("home")


def equal(a: State, b: State) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a.arrays().values(), b.arrays().values(), strict=True))


def test_a_session_goes_on_as_if_never_left(chat: Run, home: Path) -> None:
    turns = ["Hi", "And then?", "你好 🙂", "/undo", "Bye", "/retry", "End"]
    whole = chat("--seed", 5, input="\n".join(turns))
    parts = ""
    for i, turn in enumerate(turns):
        seed = () if i else ("--seed", 5)
        result = chat("--session", "a", *seed, input=turn)
        assert result.exit_code == 0, result.output
        parts += result.stdout
    assert parts == whole.stdout
    data = sessions.read("a")
    assert [turn["user"] for turn in data["turns"]] == ["Hi", "And then?", "Bye", "End"]
    assert len(list(home.glob("a/state-*"))) == 4


def test_nothing_is_read_again(byte_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rwkv_cli.load(byte_model)
    talk = begun(model, "one", "two")
    Session("a").save(talk)
    monkeypatch.setattr(type(model), "advance", lambda *_: pytest.fail("read something"))
    _, resumed = Session.resume("a", model)
    assert equal(resumed.now.state, talk.now.state)
    assert (resumed.now.unread, resumed.now.random) == (talk.now.unread, talk.now.random)
    assert [turn.answer for turn in resumed.turns] == [turn.answer for turn in talk.turns]
    resumed.undo()
    assert talk.turns[1].before is not None
    assert equal(resumed.now.state, talk.turns[1].before.state)


def test_settings_and_beginnings_are_kept(chat: Run) -> None:
    options = ("--template", "g1", "--think", "off", "--system", "Be brief.", "--top-p", 0.7, "--temperature", 1.5)
    whole = chat("--seed", 5, *options, input="a\nb\n/reset\nc\n").stdout
    assert chat("--seed", 5, "--session", "a", *options, input="a\n").exit_code == 0
    rest = chat("--session", "a", input="b\n/reset\nc\n").stdout
    assert rest
    assert whole.endswith(rest)
    refused = chat("--session", "a", "--system", "x", input="b\n")
    assert refused.exit_code == 2
    assert "session a has begun" in refused.stderr


def test_a_session_brings_its_model(rwkv: Run, byte_model: Path) -> None:
    first = rwkv("chat", "-m", byte_model, "-n", 12, "--session", "a", "--seed", 1, input="Hi\n")
    again = rwkv("chat", "-n", 12, "--session", "a", input="/undo\n/set seed 1\nHi\n")
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout


def test_another_model_is_refused(rwkv: Run, byte_model: Path, tmp_path: Path) -> None:
    rwkv("chat", "-m", byte_model, "-n", 3, "--session", "a", input="Hi\n")
    weights = tiny.weights("7", vocab=256)
    weights["head.weight"] *= 2
    other = tmp_path / "other.safetensors"
    assert rwkv("convert", tiny.write_pth(tmp_path / "o.pth", weights, "F32"), other).exit_code == 0
    before = sessions.read("a")
    result = rwkv("chat", "-m", other, "--session", "a", input="Hi\n")
    tiny.refused(result, "session a belongs to another model", byte_model, other)
    assert sessions.read("a") == before


def test_settings_are_kept_too(chat: Run) -> None:
    chat("--session", "a", input="Hi\n/set max_tokens 4\n/set top_k 7\n")
    data = sessions.read("a")
    assert (data["max_tokens"], data["sampling"]["top_k"]) == (4, 7)
    seeds = {chat("--session", "a", input="/params\n").stderr.split("seed")[1].split()[0] for _ in range(2)}
    assert seeds == {str(data["seed"])}


def turns(name: str) -> list[str]:
    return [turn["user"] for turn in sessions.read(name)["turns"]]


@pytest.mark.parametrize("anew", ["/reset", "/system Be brief.", "/undo"])
def test_what_is_kept_is_never_emptied(chat: Run, anew: str) -> None:
    chat(input=f"Hi\n/save a\n{anew}\n/set top_k 3\n")
    assert turns("a") == ["Hi"]
    chat("--session", "a", input=f"{anew}\n/params\n")
    assert turns("a") == ["Hi"]
    assert sessions.names() == ["a"]


def test_a_reset_leaves_the_session(chat: Run) -> None:
    result = chat(
        "--session", "a", input="one\ntwo\n/reset\nthree\n/reset\nfour\n/undo\n/undo\nfive\n/load a\n/history\n"
    )
    assert {name: turns(name) for name in sessions.names()} == {
        "a": ["one", "two"], "a-2": ["three", "five"], "a-3": ["four"]
    }  # fmt: skip
    assert result.stdout.count("> two") == 1
    assert "Session a stays as it is; what you say now is kept as a-2." in result.stderr


def test_undo_goes_past_the_kept_states(chat: Run) -> None:
    said = [f"turn {i}" for i in range(8)]
    chat("--session", "a", input="\n".join(said))
    result = chat("--session", "a", input="/undo\n" * 6 + "/retry\n" * 2)
    assert result.exit_code == 0
    assert turns("a") == said[:2]
    assert "read once more" in result.stderr
    assert chat("--session", "a", input="/undo\n/undo\n/undo\n").stderr.endswith("there is no turn yet\n")
    assert turns("a") == said[:1]


def test_the_last_chat_without_a_name(chat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no last chat" in chat("--last").stderr
    monkeypatch.setattr("rwkv_cli.terminal.repl.is_terminal", lambda: True)
    for one in ("one\n", ""):
        assert "/save NAME before leaving" not in chat(input=one).stderr
    left = chat(input="two\nthree\n/exit\n")
    assert left.stderr.endswith(
        "/save NAME before leaving keeps a chat under a name; rwkv chat --last goes on with this one.\n"
    )
    chat(input="a chat of one turn\n")
    assert sessions.names() == []
    resumed = chat("--last", input="four\n")
    assert resumed.exit_code == 0
    assert "the last chat, 2 turns" in resumed.stderr
    assert turns(sessions.LAST) == ["two", "three", "four"]
    chat("--last", input="/reset\nfive\nsix\n")
    assert turns(sessions.LAST) == ["five", "six"]
    chat(input="seven\neight\n/save b\nnine\n")
    assert turns(sessions.LAST) == ["seven", "eight"]
    assert "/save NAME before leaving" not in chat("--session", "b", input="ten\n").stderr
    refused = chat("--last", "--session", "b")
    assert refused.exit_code == 2


def test_sessions_rm_goes_on(chat: Run, rwkv: Run) -> None:
    for name in ("a", "b"):
        chat("--session", name, input="Hi\n")
    result = rwkv("sessions", "rm", "a", "none", "b")
    assert result.exit_code == 1
    assert result.stderr.startswith("Removed a.\nRemoved b.\nError: there is no session none;")
    assert sessions.names() == []


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="Windows sets no time zone for a process")
def test_sessions_are_listed_in_local_time(chat: Run, rwkv: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat("--session", "a", input="Hi\n")
    transcript = home / "a" / "transcript.json"
    data = json.loads(transcript.read_text("utf-8"))
    for saved, want in (("2026-01-31T22:30:00+00:00", "2026-02-01 04:00"), ("some day", "some day")):
        transcript.write_text(json.dumps(data | {"saved": saved}), "utf-8")
        with monkeypatch.context() as zone:
            zone.setenv("TZ", "XXX-5:30")
            time.tzset()
            assert want in rwkv("sessions", "list").stdout
        time.tzset()


def test_loading_does_not_drop_what_is_not_kept(chat: Run) -> None:
    chat("--session", "a", input="Hi\n")
    result = chat(input="one\n/load a\n/history\n/save b\n/load a\n/history\n")
    assert "this conversation is not kept yet" in result.stderr
    assert result.stdout.count("> one") == 1
    assert result.stdout.count("> Hi") == 1


def test_save_fork_and_load(chat: Run) -> None:
    result = chat(
        "--session", "a", "--seed", 5, input="one\n/save b\ntwo\n/fork c\nthree\n/load b\nfour\n/save a\n/save\n"
    )
    assert result.exit_code == 0
    users = {name: [turn["user"] for turn in sessions.read(name)["turns"]] for name in sessions.names()}
    assert users == {"a": ["one", "two"], "b": ["one", "four"], "c": ["one", "two", "three"]}
    assert "session a exists" in result.stderr
    assert "type it as /save NAME" in result.stderr
    chat("--seed", 5, input="one\n/save d\ntwo\n/save d\n")  # without a session, it is one from then on
    assert [turn["user"] for turn in sessions.read("d")["turns"]] == ["one", "two"]


def test_a_tuned_state_is_kept(byte_model: Path) -> None:
    model = rwkv_cli.load(byte_model)
    start = model.new_state()
    start.wkv += 0.5
    talk = Conversation(model, TEMPLATES["plain"], Sampling(), 5, 9, start=start)
    list(talk.reply("one").stream())
    Session("a").save(talk)
    _, resumed = Session.resume("a", model)
    resumed.reset()
    assert equal(resumed.now.state, start)


def test_the_sessions_command(chat: Run, rwkv: Run, home: Path) -> None:
    empty = rwkv("sessions", "list")
    assert (empty.exit_code, empty.stdout) == (0, "")
    answer = chat("--session", "erste", input="Hi\n").stdout.strip()
    chat("--session", "zweite", input="Hi\nHo\n")
    listed = rwkv("sessions", "list").stdout.splitlines()
    assert [line.split()[:2] for line in listed[1:]] == [["zweite", "2"], ["erste", "1"]]
    objects = [json.loads(line) for line in rwkv("sessions", "list", "--json").stdout.splitlines()]
    assert [o["turns"] for o in objects] == [2, 1]
    shown = rwkv("sessions", "show", "erste").stdout
    assert f"**You:** Hi\n\n{answer}\n" in shown
    assert json.loads(rwkv("sessions", "show", "erste", "--json").stdout)["turns"][0]["answer"] == answer
    (home / "erste" / "transcript.json").write_text("{")
    damaged = rwkv("sessions", "list")
    assert (damaged.exit_code, len(damaged.stdout.splitlines())) == (0, 2)
    assert "session erste is damaged" in damaged.stderr
    assert rwkv("sessions", "rm", "erste", "zweite").exit_code == 0
    assert list(home.iterdir()) == []
    tiny.refused(rwkv("sessions", "show", "erste"), "there is no session erste")
    tiny.refused(rwkv("sessions", "rm", "erste"), "there is no session erste")
    tiny.refused(rwkv("sessions", "rm", ".."), "cannot name a session")
