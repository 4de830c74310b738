"""Chats kept on disk: resumed bit for bit, whole after any death, refused where they do not fit."""

import io
import json
import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import Result

import rwkv_cli
from rwkv_cli.engine import sessions
from rwkv_cli.engine.conversation import Conversation
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.engine.sessions import Session
from rwkv_cli.engine.templates import TEMPLATES
from rwkv_cli.errors import SessionError
from rwkv_cli.models import State

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("rwkv_cli.engine.sessions.folder", lambda: tmp_path / "sessions")
    return tmp_path / "sessions"


@pytest.fixture
def chat(rwkv: Run, byte_model: Path) -> Run:
    def run(*options: object, input: str | bytes = "") -> Result:
        return rwkv("chat", "-m", byte_model, "-n", 12, *options, input=input)

    return run


def begun(model: Any, *turns: str) -> Conversation:
    talk = Conversation(model, TEMPLATES["plain"], Sampling(top_p=1.0), 5, 9)
    for turn in turns:
        list(talk.reply(turn).stream())
    return talk


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


def damage(path: Path, how: str) -> None:
    text = path.read_text("utf-8")
    data = json.loads(text)
    if how == "cut":
        path.write_text(text[: len(text) // 2])
    elif how == "list":
        path.write_text("[]")
    elif how == "newer":
        path.write_text(json.dumps(data | {"format": 99}))
    elif how == "no states":
        path.write_text(json.dumps(data | {"states": []}))
    elif how == "elsewhere":
        path.write_text(json.dumps(data | {"states": [s | {"file": "../../secret"} for s in data["states"]]}))
    elif how == "random":
        path.write_text(json.dumps(data | {"states": [s | {"random": {"x": 1}} for s in data["states"]]}))
    elif how == "unknown template":
        path.write_text(json.dumps(data | {"template": "none"}))
    elif how == "sampling":
        path.write_text(json.dumps(data | {"sampling": {"heat": 1}}))
    elif how == "heat":
        path.write_text(json.dumps(data | {"sampling": {"temperature": "hot"}}))
    elif how in data:
        path.write_text(json.dumps({key: value for key, value in data.items() if key != how}))
    elif how in ("NaN", "1.5"):
        path.write_text(
            json.dumps(data | {"sampling": data["sampling"] | {"temperature" if how == "NaN" else "top_k": float(how)}})
        )
    elif how in ("seed -1", "max_tokens 0", "revision 1.5"):
        path.write_text(json.dumps(data | {how.split()[0]: json.loads(how.split()[1])}))
    elif how == "surrogate":
        path.write_text(json.dumps(data | {"system": "\ud800"}))
    elif how == "large random":
        for state in data["states"]:
            state["random"]["state"]["state"] = 1 << 200
        path.write_text(json.dumps(data))
    elif how == "turn":
        path.write_text(json.dumps(data | {"turns": [{"user": 1, "answer": 2}]}))
    elif how == "state":
        (path.parent / data["states"][-1]["file"]).write_bytes(b"nothing")
    elif how == "gone":
        for file in path.parent.glob("state-*"):
            file.unlink()


@pytest.mark.parametrize(
    "how",
    [
        "NaN",
        "1.5",
        "seed -1",
        "max_tokens 0",
        "revision 1.5",
        "surrogate",
        "large random",
        "cut",
        "list",
        "newer",
        "no states",
        "elsewhere",
        "random",
        "unknown template",
        "sampling",
        "heat",
        "turn",
        "state",
        "gone",
        "saved",
        "model",
        "turns",
        "revision",
        "template",
    ],
)
def test_a_broken_session_is_refused_and_left(chat: Run, home: Path, how: str) -> None:
    assert chat("--session", "a", input="Hi\n").exit_code == 0
    damage(home / "a" / "transcript.json", how)
    files = {path: path.read_bytes() for path in (home / "a").iterdir()}
    result = chat("--session", "a", input="Hi\n")
    tiny.refused(result, "session a")
    assert {path: path.read_bytes() for path in (home / "a").iterdir()} == files
    assert chat("--session", "b", input="/load a\nHi\n").exit_code == 0  # a chat in work goes on
    assert len(sessions.read("b")["turns"]) == 1


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/etc", "a b", "x" * 65, "-a", "a\n"])
def test_names_stay_in_their_folder(chat: Run, name: str, home: Path) -> None:
    result = chat("--session", name, input="Hi\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "cannot name a session" in result.stderr
    assert not home.exists()


@pytest.mark.parametrize("at", range(4))
def test_a_death_while_saving_loses_one_turn_at_most(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch, at: int, home: Path
) -> None:
    model = rwkv_cli.load(byte_model)
    talk, session = begun(model, "one"), Session("a")
    session.save(talk)
    before = sessions.read("a")
    list(talk.reply("two").stream())
    calls = 0

    def dies(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > at:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, dies(getattr(os, name)))
    monkeypatch.setattr(Path, "replace", dies(Path.replace))
    with pytest.raises(OSError, match="No space left"):
        session.save(talk)
    monkeypatch.undo()
    monkeypatch.setattr("rwkv_cli.engine.sessions.folder", lambda: home)
    assert sessions.read("a") == before
    _, resumed = Session.resume("a", model)
    assert [turn.user for turn in resumed.turns] == ["one"]
    session.save(talk)
    assert len(sessions.read("a")["turns"]) == 2


def test_a_chat_goes_on_where_it_cannot_be_saved(chat: Run, home: Path) -> None:
    home.write_text("a file where the folder should be")
    result = chat("--session", "a", "--seed", 5, input="Hi\nThere\n")
    assert result.exit_code == 1, "what was said is on no disk"
    assert result.stdout == chat("--seed", 5, input="Hi\nThere\n").stdout
    assert result.stderr.count("session a was not saved: ") == 2
    assert chat("--session", "a", "Hi").exit_code == 1
    home.unlink()
    assert chat("--session", "a", "Hi").exit_code == 0


def test_two_chats_do_not_overwrite_each_other(byte_model: Path) -> None:
    model = rwkv_cli.load(byte_model)
    Session("a").save(begun(model, "one"))
    first, talk = Session.resume("a", model)
    second, other = Session.resume("a", model)
    list(talk.reply("two").stream())
    first.save(talk)
    list(other.reply("zwei").stream())
    with pytest.raises(SessionError, match="changed by another chat"):
        second.save(other)
    assert [turn["user"] for turn in sessions.read("a")["turns"]] == ["one", "two"]


def test_two_chats_at_once_leave_one_whole(byte_model: Path) -> None:
    model = rwkv_cli.load(byte_model)
    talks = [begun(model, "one", "two"), begun(model, "eins", "zwei")]
    for round_ in range(10):
        name = f"s{round_}"

        def save(talk: Conversation, name: str = name) -> None:
            with suppress(SessionError):
                Session(name).save(talk)

        threads = [threading.Thread(target=save, args=(talk,)) for talk in talks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        session, resumed = Session.resume(name, model)
        assert session.revision == 1
        assert [turn.user for turn in resumed.turns] in (["one", "two"], ["eins", "zwei"])


def test_only_the_last_state_has_to_be_there(byte_model: Path, home: Path) -> None:
    model = rwkv_cli.load(byte_model)
    Session("a").save(begun(model, "one", "two", "three"))
    (home / "a" / sessions.read("a")["states"][1]["file"]).unlink()
    _, resumed = Session.resume("a", model)
    assert [turn.before is None for turn in resumed.turns] == [False, True, False]
    before = resumed.turns[0].before
    assert before is not None
    for _ in range(2):
        resumed.undo()
    assert resumed.turns[0].before is before
    assert [turn.user for turn in resumed.turns] == ["one"]


def test_what_is_left_of_a_session_is_not_taken_over(byte_model: Path, rwkv: Run, home: Path) -> None:
    model = rwkv_cli.load(byte_model)
    old, new = (model.new_state() for _ in range(2))
    old.wkv += 1
    new.wkv += 2
    for start in (old, new):
        (home / "a" / "transcript.json").unlink(missing_ok=True)
        talk = Conversation(model, TEMPLATES["plain"], Sampling(), 5, 9, start=start)
        Session("a").save(talk)
    (home / "a" / ".rwkv-0.part").touch()
    session, resumed = Session.resume("a", model)
    assert resumed.start is not None
    assert equal(resumed.start, new)
    session.save(resumed)
    assert not (home / "a" / ".rwkv-0.part").exists()
    (home / "a" / "transcript.json").unlink()
    assert rwkv("sessions", "rm", "a").exit_code == 0
    assert not (home / "a").exists()


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
    assert chat("--session", "a", input="/undo\n/undo\n/undo\n").stderr.endswith("there is no turn to take back\n")
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


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="Windows")
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


def test_only_the_user_can_read_them(chat: Run, home: Path) -> None:
    chat("--session", "a", input="Hi\n")
    assert stat.S_IMODE((home / "a").stat().st_mode) == 0o700


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


def test_a_chat_goes_on_under_a_free_name_where_another_has_changed_its_session(byte_model: Path, chat: Run) -> None:
    """Nothing that was said is lost, on either side."""
    model = rwkv_cli.load(byte_model)
    Session("a").save(begun(model, "one"))

    class Slow(io.BytesIO):
        """Standard input, of which the second turn comes after another chat has saved."""

        def readline(self, size: int | None = -1) -> bytes:
            line = super().readline(size)
            if line == b"drei\n":
                session, other = Session.resume("a", model)
                list(other.reply("two").stream())
                session.save(other)
            return line

    result = chat("--session", "a", input=Slow(b"zwei\ndrei\nvier\n"))
    assert result.exit_code == 0
    assert result.stderr.count("Another chat has changed session a. This chat is kept as a-2.") == 1
    assert "not saved" not in result.stderr
    assert [turn["user"] for turn in sessions.read("a")["turns"]] == ["one", "zwei", "two"]
    assert [turn["user"] for turn in sessions.read("a-2")["turns"]] == ["one", "zwei", "drei", "vier"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("name", ["transcript.json", "lock"])
def test_a_pipe_in_a_session_is_named(chat: Run, home: Path, name: str) -> None:
    """Reading it would never end."""
    chat("--session", "a", input="Hi\n")
    (home / "a" / name).unlink()
    os.mkfifo(home / "a" / name)
    tiny.refused(chat("--session", "a", input="Hi\n"), name)


def test_a_link_in_the_place_of_the_lock_empties_nothing(chat: Run, home: Path, tmp_path: Path) -> None:
    chat("--session", "a", input="Hi\n")
    (tmp_path / "other").write_text("kept")
    (home / "a" / "lock").unlink()
    (home / "a" / "lock").symlink_to(tmp_path / "other")
    assert chat("--session", "a", input="Hi\n").exit_code == 0
    assert (tmp_path / "other").read_text() == "kept"
