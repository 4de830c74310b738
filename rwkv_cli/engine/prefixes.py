"""States after the beginnings of texts, so that no text is read twice: in memory, then on disk.

A state is found by the longest prefix of a prompt's ids that is known. A token gets the same bits wherever a text is
cut, so an answer does not depend on what is found.
"""

import base64
import bisect
import contextlib
import hashlib
import json
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.errors import FormatError
from rwkv_cli.kernels.cache import cache_folder
from rwkv_cli.models import State

_FACTS = 16
"""Bytes of a key that say which model the state belongs to. The ids follow, four bytes each, the high one first."""

_WAITING = 8
"""States that may wait to be written. More are given up, so that a slow disk takes no memory."""

_CLOSING = 3.0
"""Seconds for which states are written at the end."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The most bytes that states may take."""

    memory: int
    disk: int = 0
    folder: Path | None = None
    """The folder that keeps them on disk, None for none."""


@dataclass
class _Kept:
    """A known state. What is not in memory lies on disk."""

    state: State | None
    size: int = 0
    logits: NDArray[np.float32] | None = None
    """The logits [V] there, where a prompt ended. They are in memory only."""


class Prefixes:
    """The states of all models, the last used ones. One thread may use them."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._keys: list[bytes] = []
        """The keys of all states, sorted, so that neighbours share the longest prefixes."""
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        """The states by key, the last used one last."""
        self._memory = 0
        self._writing: dict[bytes, State] = {}
        """States on their way to the disk."""
        self._gone: deque[bytes] = deque()
        """Keys whose files were removed."""
        self._tasks: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._writer: threading.Thread | None = None
        if bounds.folder is not None and bounds.disk:
            self._open(bounds.folder)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def memory(self) -> int:
        """Bytes of the states in memory."""
        return self._memory

    def whole(self, key: bytes) -> tuple[State, NDArray[np.float32]] | None:
        """Return the state and the logits after all of `key`, if both are in memory."""
        kept = self._kept.get(key)
        if kept is None or kept.state is None or kept.logits is None:
            return None
        self._kept.move_to_end(key)
        return kept.state, kept.logits

    def find(self, key: bytes, like: State) -> tuple[State, bytes] | None:
        """Return the state after the longest known prefix of `key` that is shorter, and the prefix."""
        while (known := self._longest(key)) is not None:
            kept = self._kept[known]
            state = kept.state or self._writing.get(known) or self._load(known, like)
            if state is None:
                self._forget(known)
                continue
            self._kept.move_to_end(known)
            self._hold(known, kept, state)
            return state, known
        return None

    def shared(self, key: bytes) -> int:
        """Return the length of the longest beginning that `key` shares with a known key."""
        at = bisect.bisect_left(self._keys, key)
        return max((_common(key, other) for other in self._keys[max(at - 1, 0) : at + 1]), default=0)

    def keep(self, key: bytes, state: State, logits: NDArray[np.float32] | None = None) -> None:
        """Keep a copy of the state after the ids of a key, and the logits there if they are given."""
        while self._gone:
            gone = self._gone.popleft()
            if gone in self._kept and self._kept[gone].state is None and gone not in self._writing:
                self._forget(gone)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = _Kept(None)
            bisect.insort(self._keys, key)
        self._kept.move_to_end(key)
        if kept.logits is None and logits is not None:
            kept.logits = logits
            if kept.state is not None:
                kept.size, self._memory = kept.size + logits.nbytes, self._memory + logits.nbytes
        if kept.state is None:
            copies = (np.array(array) for array in state.arrays().values())  # in this machine's memory
            self._hold(key, kept, State(state.version, *copies, digest=state.digest))

    def close(self) -> None:
        """Write what is in memory, the last used first, for some seconds at most."""
        if self._writer is None:
            return
        deadline = time.monotonic() + _CLOSING
        for key in reversed(list(self._kept)):
            kept = self._kept[key]
            if kept.state is None or time.monotonic() > deadline:
                continue
            self._writing[key] = kept.state
            with contextlib.suppress(queue.Full):
                self._tasks.put(key, timeout=max(0.0, deadline - time.monotonic()))
        self._tasks.put(None)
        self._writer.join()

    def _longest(self, key: bytes) -> bytes | None:
        """Return the longest known key that `key` begins with and that is shorter."""
        part = key[:-1]
        while len(part) > _FACTS:
            at = bisect.bisect_right(self._keys, part)
            if not at:
                return None
            before = self._keys[at - 1]
            same = _common(part, before)
            if same == len(before):
                return before if same > _FACTS else None
            part = part[:same]
        return None

    def _hold(self, key: bytes, kept: _Kept, state: State) -> None:
        """Have a state in memory, and make room for it."""
        if kept.state is None:
            numbers = [*state.arrays().values(), *([] if kept.logits is None else [kept.logits])]
            kept.state, kept.size = state, sum(array.nbytes for array in numbers) + len(key)
            self._memory += kept.size
        for old in list(self._kept) if self._memory > self.bounds.memory else ():
            if self._memory <= self.bounds.memory:
                break
            self._give_up(old)

    def _give_up(self, key: bytes) -> None:
        """Take a state out of memory, and have it written if there is a disk for it."""
        kept = self._kept[key]
        if kept.state is None:
            return
        self._memory -= kept.size
        state, kept.state, kept.logits = kept.state, None, None
        if self._writer is not None:
            self._writing[key] = state
            with contextlib.suppress(queue.Full):
                self._tasks.put_nowait(key)
                return
            del self._writing[key]
        self._forget(key)

    def _forget(self, key: bytes) -> None:
        """Remove a key."""
        del self._kept[key], self._keys[bisect.bisect_left(self._keys, key)]

    def _open(self, folder: Path) -> None:
        """Learn what is on disk, the last used last, and begin to write there."""
        folder.mkdir(0o700, parents=True, exist_ok=True)
        for path in _by_age(folder):
            try:
                key = base64.b64decode(State.read_metadata(path)["prefix"], validate=True)
            except (FormatError, KeyError, ValueError, OSError):
                continue
            if path == self._path(key):
                self._kept[key] = _Kept(None)
        self._keys = sorted(self._kept)
        self._writer = threading.Thread(target=self._write, name="rwkv-states", daemon=True)
        self._writer.start()

    def _path(self, key: bytes) -> Path:
        """Return the file of a key."""
        assert self.bounds.folder is not None, "there is a disk"
        return self.bounds.folder / f"{hashlib.sha256(key).hexdigest()[:32]}.safetensors"

    def _load(self, key: bytes, like: State) -> State | None:
        """Read a state from disk, None if it is not there or damaged."""
        if self._writer is None:
            return None
        path = self._path(key)
        try:
            state = State.load(path, like)
            path.touch()
        except FormatError:
            path.unlink(missing_ok=True)
            return None
        except OSError:
            return None
        return state

    def _write(self) -> None:
        """Write states, and remove the oldest files where there are too many bytes. This is the writer's thread."""
        while (key := self._tasks.get()) is not None:
            path, state = self._path(key), self._writing.get(key)
            with contextlib.suppress(OSError, FormatError):
                if path.exists():
                    path.touch()
                elif state is not None:
                    state.save(path, {"prefix": base64.b64encode(key).decode()})
                self._make_room(path.parent)
            self._writing.pop(key, None)
            if not path.exists():
                self._gone.append(key)

    def _make_room(self, folder: Path) -> None:
        """Remove the oldest files until the rest has room."""
        files = _by_age(folder)
        over = sum(path.stat().st_size for path in files) - self.bounds.disk
        for path in files:
            if over <= 0:
                break
            over -= path.stat().st_size
            with contextlib.suppress(FormatError, KeyError, ValueError):
                self._gone.append(base64.b64decode(State.read_metadata(path)["prefix"]))
            path.unlink(missing_ok=True)


def states_folder() -> Path:
    """Return the folder of states on disk, in the user's cache."""
    return cache_folder().parent / "states"


class ModelPrefixes:
    """The states of one model among those of all."""

    def __init__(self, prefixes: Prefixes, model: LanguageModel) -> None:
        self._prefixes = prefixes
        self._start = model.new_state()
        facts = [model.digest, model.quantization, model.config.changed(), model.backend.name, cache_folder().name]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for array in self._start.arrays().values():
            digest.update(np.ascontiguousarray(array).data)
        self._facts = digest.digest()[:_FACTS]

    def _key(self, ids: Sequence[int]) -> bytes:
        return self._facts + np.array(ids, ">u4").tobytes()

    def find(self, ids: Sequence[int]) -> tuple[State, int]:
        """Return the state to read on from, and how many of `ids` it has read, which are not all."""
        found = self._prefixes.find(self._key(ids), self._start)
        return (self._start, 0) if found is None else (found[0], (len(found[1]) - _FACTS) // 4)

    def whole(self, ids: Sequence[int]) -> tuple[State, NDArray[np.float32]] | None:
        """Return the state and the logits [V] after all of `ids`, if they are known."""
        return self._prefixes.whole(self._key(ids))

    def shared(self, ids: Sequence[int]) -> int:
        """Return how many of `ids` at their beginning some other text has, too."""
        return max(0, self._prefixes.shared(self._key(ids)) - _FACTS) // 4

    def keep(self, ids: Sequence[int], state: State, logits: NDArray[np.float32] | None = None) -> None:
        """Keep a copy of the state after `ids`, and the logits there if they are given."""
        self._prefixes.keep(self._key(ids), state, None if logits is None else logits.copy())


def _by_age(folder: Path) -> list[Path]:
    """List the files of states, the last used last."""
    found = []
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found)]


def _common(a: bytes, b: bytes) -> int:
    """Return the length of the longest common beginning."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return int(np.argmax(np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n)))
