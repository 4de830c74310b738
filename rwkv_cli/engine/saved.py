"""Files that a text goes on from: saved states, and caches of prompts that were read."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cli.engine.completion import Completion, OnRead
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.errors import FormatError
from rwkv_cli.models import State
from rwkv_cli.quant import check_regular

CACHE, STATE = "prompt cache", "saved state"
"""The two kinds of file, as messages name them."""


@dataclass(frozen=True)
class Start:
    """The beginning of a text: a state, and what comes before the prompt that the state has not read."""

    state: State
    ids: Sequence[int] = ()
    """The text after the state, as token ids."""
    unread: str = ""
    """The text after the state, where no ids are known: `save_end` did not write the file."""
    counts: dict[int, float] = field(default_factory=dict)
    """Tokens that the sampler penalizes (`Sampler.counts`)."""
    seed: int | None = None
    """Seed of the sampler that made the text so far."""
    random: dict[str, Any] | None = None
    """Position in that sampler's random numbers (`Sampler.random`)."""


def save_end(path: Path, completion: Completion) -> None:
    """Keep the end of a text, so that the text can go on as if it had not ended."""
    sampler, result = completion.sampler, completion.result
    going_on = {
        "ids": list(result.unread_ids),
        "counts": sampler.counts,
        "seed": sampler.seed,
        "random": sampler.random,
    }
    completion.state.save(path, {"unread": result.unread, "going_on": json.dumps(going_on)})


def load_start(path: Path, model: LanguageModel) -> Start:
    """Read what `save_end` wrote, or any saved state.

    Raises FormatError where the file is not a state of this model or is damaged.
    """
    metadata = State.read_metadata(path)
    if _kind(metadata) == CACHE:
        raise FormatError(f"{path}: a prompt cache, not a saved state; give it with --prompt-cache")
    state = State.load(path, model.new_state())
    if "going_on" not in metadata:
        return Start(state, unread=metadata.get("unread", ""))
    try:
        going_on = json.loads(metadata["going_on"])
        ids, counts = list(going_on["ids"]), {int(id): float(count) for id, count in going_on["counts"].items()}
        if not all(type(id) is int and 0 <= id < model.config.vocab for id in (*ids, *counts)):
            raise ValueError("an id is outside the vocabulary")
        if not all(map(math.isfinite, counts.values())):
            raise ValueError("a count is not finite")
        seed, random = going_on["seed"], going_on["random"]
        if type(seed) is not int:
            raise ValueError("the seed is not a whole number")
        sampler = Sampler(Sampling(), seed)
        sampler.random = random
        if sampler.random != random:
            raise ValueError("the random numbers are nowhere that they can be")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise FormatError(f"{path}: what is kept beside the state is damaged; save it again") from None
    return Start(state, ids, counts=counts, seed=seed, random=random)


def check_target(path: Path, kind: str) -> Path:
    """Return the file to write: `path`, or the target of that link.

    Raises FormatError for a file that cannot be written, and for one that is there and is not of this kind.
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FormatError(f"{path.parent} is not a folder; make it first, or give another file")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise FormatError(f"{path.parent}: no file can be made there ({error.strerror}); give another file") from None
    check_regular(path)
    if path.exists():
        try:
            same = path.is_file() and _kind(State.read_metadata(path)) == kind
        except FormatError:
            same = False
        if not same:
            raise FormatError(f"{path} is there and is not a {kind}; remove it, or give another file")
    return path


def _kind(metadata: Mapping[str, str]) -> str:
    """Return the kind of a file, from its metadata."""
    return CACHE if "prompt_cache" in metadata else STATE


class PromptCache:
    """A file with the state after a prompt less its last token. It serves all prompts that begin like this one.

    The last token is read each time, because its logits begin the text. A token gets the same bits wherever a prompt
    is cut, so a text does not depend on the cache.
    """

    def __init__(self, path: Path, model: LanguageModel, start: State, ids: Sequence[int]) -> None:
        """`start` is the state before the first of `ids`. It is not changed."""
        self.path, self._start, self._ids = path, start, ids
        facts = [model.digest, model.quantization, model.config.changed(), model.backend.name]
        self._facts = hashlib.sha256(json.dumps(facts).encode())
        for array in start.arrays().values():
            self._facts.update(np.ascontiguousarray(array).data)

    def _key(self, tokens: int) -> str:
        """Digest of everything that the state after this many tokens follows from."""
        key = self._facts.copy()
        key.update(np.array(self._ids[:tokens], "<i8").data)
        return key.hexdigest()

    def find(self, warn: Callable[[str], object]) -> tuple[State, int]:
        """Return the state to read on from, and how many tokens it has read: 0 if the file knows none of them.

        `warn` is called with a sentence if a file is there and does not help.
        """
        if not self.path.exists():
            return self._start, 0
        why = f"{self.path}: of another prompt, model or initial state"
        try:
            metadata = State.read_metadata(self.path)
            tokens = int(metadata["tokens"])
            if 0 < tokens < len(self._ids) and metadata["prompt_cache"] == self._key(tokens):
                return State.load(self.path, self._start), tokens
        except FormatError as error:
            why = str(error)
        except (KeyError, ValueError):
            pass
        warn(f"{why}; the prompt is read from its beginning")
        return self._start, 0

    def fill(self, completion: Completion, on_read: OnRead) -> None:
        """Have `completion` read all of the prompt but its last token, and write the file."""
        tokens = len(self._ids) - 1
        completion.read(tokens, on_read)
        if 0 < tokens == completion.result.prompt_tokens:
            completion.state.save(self.path, {"prompt_cache": self._key(tokens), "tokens": str(tokens)})
