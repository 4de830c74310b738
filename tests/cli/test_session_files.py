"""The files of sessions: nothing that was said is lost, whatever is damaged, in the way, or at work beside."""

import io
import json
import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

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
from rwkv_cli.errors import SessionError

Run = Callable[..., Result]
pytestmark = pytest.mark.usefixtures("home")


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
    for name, array in new.arrays().items():
        np.testing.assert_array_equal(resumed.start.arrays()[name], array)
    session.save(resumed)
    assert not (home / "a" / ".rwkv-0.part").exists()
    (home / "a" / "transcript.json").unlink()
    assert rwkv("sessions", "rm", "a").exit_code == 0
    assert not (home / "a").exists()


def test_only_the_user_can_read_them(chat: Run, home: Path) -> None:
    chat("--session", "a", input="Hi\n")
    assert stat.S_IMODE((home / "a").stat().st_mode) == 0o700


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
