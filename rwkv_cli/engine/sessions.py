"""Chats kept on disk: a folder each, with a transcript (JSON) and the states to go on from or back to (safetensors).

The transcript names its state files and is replaced last, in one step. So the folder holds one whole turn or the one
before, whenever a process is killed. A session belongs to the model that it was begun with.
"""

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import platformdirs

from rwkv_cli.engine.conversation import Conversation, Snapshot, Turn
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.errors import SessionError, pasted, reason
from rwkv_cli.models import State
from rwkv_cli.quant import check_regular, replacing

_FORMAT = 1
_KEPT = 4
"""Number of states on disk: the last one, and those that undo goes back to."""

LAST = ".last"
"""The session that the last chat without a name is kept in. No list has it."""

_START = "start.safetensors"
"""A tuned state that the conversation began with."""


def folder() -> Path:
    """Return the folder of all sessions. Raises SessionError for a user without a home folder."""
    try:
        return platformdirs.user_data_path("rwkv", appauthor=False) / "sessions"
    except RuntimeError:
        raise SessionError("this user has no home folder to keep sessions in; set HOME to a folder") from None


def names() -> list[str]:
    """List every session, the last used first."""
    found = [path for path in folder().glob("*/transcript.json") if path.is_file() and path.parent.name != LAST]
    return [path.parent.name for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def exists(name: str) -> bool:
    """Return whether a session has this name. Raises SessionError for a name that no folder may have."""
    return (path_of(name) / "transcript.json").exists()


def path_of(name: str) -> Path:
    """Return the session's folder, even if it is not there. Raises SessionError for a name that no folder may have."""
    if not re.fullmatch(r"\w[\w.-]{0,63}", name) and name != LAST:
        raise SessionError(f"{name!r} cannot name a session: use up to 64 letters, digits, '-', '_' and '.'")
    return folder() / name


def next_name(name: str) -> str:
    """Return a free name for what is said after a session was left: diary-2 after diary, or diary-3."""
    stem = re.sub(r"-[0-9]+$", "", name)[:56]
    return next(free for count in itertools.count(2) if not exists(free := f"{stem}-{count}"))


def read(name: str) -> dict[str, Any]:
    """Read the transcript of a session. It is checked as far as programs rely on it. Raises SessionError."""
    path = path_of(name) / "transcript.json"
    try:
        check_regular(path)
        data: Any = json.loads(path.read_text("utf-8"))
        if data["format"] > _FORMAT:
            raise SessionError(f"session {name} was written by a newer rwkv; upgrade rwkv-cli")
        words = [data["saved"], data["model"]["path"], data["model"]["digest"], data["system"], data["think"]]
        words += [part for turn in data["turns"] for part in (turn["user"], turn["answer"])]
        for word in words:
            word.encode()  # which fails for half a surrogate pair, and for what is no text
        limit = 1 if data["max_tokens"] is None else data["max_tokens"]
        for number, least in ((data["revision"], 1), (data["seed"], 0), (limit, 1)):
            if type(number) is not int or not least <= number < 1 << 63:
                raise ValueError("a number is of the wrong kind or size")
        Sampling(**data["sampling"]).check()
    except FileNotFoundError:
        raise SessionError(f"there is no session {name}; rwkv sessions list shows those there are") from None
    except SessionError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        remove = pasted("rwkv", "sessions", "rm", name)
        raise SessionError(f"session {name} is damaged ({path}); remove it with: {remove}") from None
    return dict(data)


def remove(name: str) -> None:
    """Delete a session, or what is left of one. Raises SessionError if there is none."""
    path = path_of(name)
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        raise SessionError(f"there is no session {name}; rwkv sessions list shows those there are")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from reading and writing this folder meanwhile."""
    lock = path / "lock"
    check_regular(lock)
    with lock.open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except ImportError:  # not on Windows
            pass
        yield


@dataclass
class Session:
    """A name under which a conversation is kept."""

    name: str
    revision: int = 0
    """Revision of the transcript that this process wrote or read last, 0 before the first."""

    def save(self, conversation: Conversation) -> None:
        """Keep everything said so far. A conversation without a turn never takes the place of one that has turns.

        Raises SessionError if another process has changed the session meanwhile.
        """
        path = path_of(self.name)
        path.mkdir(0o700, parents=True, exist_ok=True)
        with _alone(path):
            if self._on_disk() != self.revision:
                raise SessionError(f"session {self.name} was changed by another chat; /fork NAME goes on in a new one")
            if conversation.turns or not self.revision or not read(self.name)["turns"]:
                self._write(path, conversation)

    def keep_last(self, conversation: Conversation) -> None:
        """Keep a conversation in the place of the last one without a name."""
        try:
            self.save(conversation)
        except SessionError:  # this is another conversation
            remove(self.name)
            self.revision = 0
            self.save(conversation)

    def _write(self, path: Path, conversation: Conversation) -> None:
        """Write the states and the transcript, and remove states that are no longer kept."""
        model, turns = conversation.model, conversation.turns
        snapshots = [*(turn.before for turn in turns), conversation.now]
        states = []
        for count, snapshot in list(enumerate(snapshots))[-_KEPT:]:
            if snapshot is not None:
                file = f"state-{snapshot.id}.safetensors"
                if not (path / file).exists():
                    snapshot.state.save(path / file)
                texts = {"unread": snapshot.unread, "read": snapshot.read}
                states.append({"turns": count, "file": file, **texts, "random": snapshot.random})
        if conversation.start is not None and self.revision == 0:
            conversation.start.save(path / _START)
        data = {
            "format": _FORMAT,
            "revision": self.revision + 1,
            "model": {"path": str(model.path.resolve()), "digest": model.digest, "version": model.config.version},
            "template": conversation.template.name,
            "style": conversation.template.style,
            "system": conversation.system,
            "think": conversation.think,
            "sampling": asdict(conversation.settings),
            "max_tokens": conversation.max_tokens,
            "seed": conversation.sampler.seed,
            "saved": datetime.now(UTC).isoformat(timespec="seconds"),
            "start": conversation.start is not None,
            "states": states,
            "turns": [{"user": turn.user, "answer": turn.answer} for turn in turns],
        }
        with replacing(path / "transcript.json") as out:
            out.write(json.dumps(data, ensure_ascii=False, indent=1).encode("utf-8", "replace"))
        self.revision += 1
        kept = {state["file"] for state in states}
        for old in (*path.glob("state-*.safetensors"), *path.glob(".rwkv-*.part")):
            if old.name not in kept:
                old.unlink(missing_ok=True)

    def _on_disk(self) -> int:
        """Return the revision on disk, 0 if there is none."""
        try:
            return int(read(self.name)["revision"])
        except SessionError:
            return 0

    @classmethod
    def resume(cls, name: str, model: LanguageModel) -> tuple["Session", Conversation]:
        """Load the session and its conversation. The model reads no word again. Raises SessionError."""
        read(name)  # a session that is not there has no folder to lock
        with _alone(path_of(name)):
            data = read(name)
            if data["model"]["digest"] != model.digest:
                raise SessionError(
                    f"session {name} belongs to another model ({data['model']['path']}), not to {model.path}; "
                    "name that one with -m, or another session"
                )
            try:
                return cls(name, data["revision"]), _restored(path_of(name), data, model)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
                why = reason(error) if isinstance(error, OSError) else error
                show = pasted("rwkv", "sessions", "show", name)
                raise SessionError(f"session {name} is damaged ({why}); {show} prints what was said") from None


def _restored(path: Path, data: dict[str, Any], model: LanguageModel) -> Conversation:
    """Restore the conversation of a transcript. Only the last of the states has to be sound."""
    talk = Conversation(
        model,
        model.template.template(data["template"], data.get("style")),
        Sampling(**data["sampling"]),
        data["seed"],
        data["max_tokens"],
        system=data["system"],
        think=data["think"],
        start=State.load(path / _START, like=model.new_state()) if data["start"] else None,
    )
    snapshots = {}
    for entry in data["states"]:
        last = entry["turns"] == len(data["turns"])
        file = path / Path(entry["file"]).name
        try:
            state = State.load(file, like=talk.now.state)
            talk.sampler.random = entry["random"]
            if talk.sampler.random != entry["random"]:
                raise ValueError("the random numbers are nowhere that they can be")
        except (KeyError, TypeError, ValueError, OverflowError, OSError):
            if last:
                raise
            continue
        unread, read, id_ = str(entry["unread"]), str(entry.get("read", "")), file.stem.removeprefix("state-")
        snapshots[entry["turns"]] = Snapshot(state, unread, entry["random"], read, id_)
    talk.turns = [Turn(turn["user"], turn["answer"], snapshots.get(i)) for i, turn in enumerate(data["turns"])]
    talk.now = snapshots[len(talk.turns)]
    return talk
