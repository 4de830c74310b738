"""Chats kept on disk: a folder each, with a transcript (JSON) and the states to go on from or back to (safetensors).

The transcript names its state files and is replaced last, in one step: whenever a process is killed, the folder holds
one whole turn or the one before. A session belongs to the model that it was begun with.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import platformdirs

from rwkv_cli.conversation import Conversation, Snapshot, Turn
from rwkv_cli.engine import LanguageModel
from rwkv_cli.models import State
from rwkv_cli.quant import replacing
from rwkv_cli.sampling import Sampling
from rwkv_cli.templates import TEMPLATES

_FORMAT = 1
_KEPT = 4
"""States on disk: the last one, and those that undo leads back to."""


_START = "start.safetensors"
"""A tuned state that the conversation began with."""


class SessionError(ValueError):
    """A session that cannot be used; the sentence names it."""


def folder() -> Path:
    """Where sessions lie."""
    return platformdirs.user_data_path("rwkv", appauthor=False) / "sessions"


def names() -> list[str]:
    """Every session, the last used first."""
    found = [path for path in folder().glob("*/transcript.json") if path.is_file()]
    return [path.parent.name for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def exists(name: str) -> bool:
    """Whether a session has this name. Raises SessionError for a name that no folder may have."""
    return (path_of(name) / "transcript.json").exists()


def path_of(name: str) -> Path:
    """The session's folder, which need not be there. Raises SessionError for a name that no folder may have."""
    if not re.fullmatch(r"\w[\w.-]{0,63}", name):
        raise SessionError(f"{name!r} cannot name a session: use up to 64 letters, digits, '-', '_' and '.'")
    return folder() / name


def read(name: str) -> dict[str, Any]:
    """The transcript of a session, checked as far as programs rely on it. Raises SessionError."""
    path = path_of(name) / "transcript.json"
    try:
        data = json.loads(path.read_text("utf-8"))
        if data["format"] > _FORMAT:
            raise SessionError(f"session {name} was written by a newer rwkv; upgrade rwkv-cli")
        for key, kind in (("model", dict), ("sampling", dict), ("turns", list), ("states", list), ("revision", int)):
            if not isinstance(data[key], kind):
                raise ValueError(key)
        for turn in data["turns"]:
            if not isinstance(turn["user"] + turn["answer"], str):
                raise ValueError("turns")
    except FileNotFoundError:
        raise SessionError(f"there is no session {name}; rwkv sessions list shows those there are") from None
    except SessionError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SessionError(f"session {name} is damaged ({path}); remove it with: rwkv sessions rm {name}") from None
    return dict(data)


def check(name: str) -> None:
    """Raises SessionError if there is no session of this name."""
    if not exists(name):
        raise SessionError(f"there is no session {name}; rwkv sessions list shows those there are")


def remove(name: str) -> None:
    """Delete a session. Raises SessionError if there is none."""
    check(name)
    shutil.rmtree(path_of(name))


@dataclass
class Session:
    """A name under which a conversation is kept."""

    name: str
    revision: int = 0
    """Of the transcript that this process wrote or read last; 0 before the first."""

    def save(self, conversation: Conversation) -> None:
        """Keep all that was said so far. Raises SessionError if another process has changed the session meanwhile."""
        path = path_of(self.name)
        path.mkdir(0o700, parents=True, exist_ok=True)
        if self._on_disk() != self.revision:
            raise SessionError(f"session {self.name} was changed by another chat; /save another name to keep this one")
        model, turns = conversation.model, conversation.turns
        snapshots = [*(turn.before for turn in turns), conversation.now]
        states = []
        for count, snapshot in list(enumerate(snapshots))[-_KEPT:]:
            if snapshot is not None:
                file = f"state-{snapshot.id}.safetensors"
                if not (path / file).exists():
                    snapshot.state.save(path / file)
                states.append({"turns": count, "file": file, "unread": snapshot.unread, "random": snapshot.random})
        if conversation.start is not None and not (path / _START).exists():
            conversation.start.save(path / _START)
        data = {
            "format": _FORMAT,
            "revision": self.revision + 1,
            "model": {"path": str(model.path.resolve()), "digest": model.digest, "version": model.config.version},
            "template": conversation.template.name,
            "system": conversation.system,
            "think": conversation.think,
            "sampling": asdict(conversation.settings),
            "seed": conversation.seed,
            "saved": datetime.now(UTC).isoformat(timespec="seconds"),
            "start": conversation.start is not None,
            "states": states,
            "turns": [{"user": turn.user, "answer": turn.answer} for turn in turns],
        }
        with replacing(path / "transcript.json") as out:
            out.write(json.dumps(data, ensure_ascii=False, indent=1).encode("utf-8", "replace"))
        self.revision += 1
        kept = {state["file"] for state in states}
        for old in path.glob("state-*.safetensors"):
            if old.name not in kept:
                old.unlink(missing_ok=True)

    def _on_disk(self) -> int:
        try:
            return int(read(self.name)["revision"])
        except SessionError:
            return 0

    @classmethod
    def resume(cls, name: str, model: LanguageModel) -> tuple["Session", Conversation]:
        """The session and its conversation, without reading a word again. Raises SessionError."""
        data, path = read(name), path_of(name)
        if data["model"].get("digest") != model.digest:
            raise SessionError(
                f"session {name} belongs to another model ({data['model'].get('path')}), not to {model.path}; "
                "name that one with -m, or another session"
            )
        try:
            template, settings = data["template"], Sampling(**data["sampling"])
            talk = Conversation(
                model, TEMPLATES[template], settings, data["seed"], system=data["system"], think=data["think"]
            )
            if data["start"]:
                talk.start = State.load(path / _START, like=talk.now.state)
            snapshots = {
                int(entry["turns"]): Snapshot(
                    State.load(path / Path(entry["file"]).name, like=talk.now.state),
                    entry["unread"], entry["random"], Path(entry["file"]).stem.removeprefix("state-"),
                )
                for entry in data["states"]
            }  # fmt: skip
            talk.turns = [Turn(turn["user"], turn["answer"], snapshots.get(i)) for i, turn in enumerate(data["turns"])]
            talk.now = snapshots[len(talk.turns)]
            for snapshot in snapshots.values():
                talk.sampler.random = snapshot.random
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise SessionError(
                f"session {name} is damaged ({error}); remove it with: rwkv sessions rm {name}"
            ) from None
        return cls(name, data["revision"]), talk
