"""Files that a text goes on from: saved states, and caches of prompts that were read."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cli.engine.completion import Completion
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.errors import FormatError
from rwkv_cli.models import State
from rwkv_cli.terminal.output import note

CACHE, STATE = "prompt cache", "saved state"
"""What such a file may be."""


@dataclass(frozen=True)
class Start:
    """Where a text begins: a state, and what comes before the prompt that the state has not read."""

    state: State
    ids: Sequence[int] = ()
    """It, as tokens…"""
    unread: str = ""
    """… or as text, in a state that `save` did not write."""
    counts: dict[int, float] = field(default_factory=dict)
    """What the sampler penalizes (`Sampler.counts`)."""
    seed: int | None = None
    """Of the sampler that made the text so far…"""
    random: dict[str, Any] | None = None
    """… and where its random numbers are (`Sampler.random`)."""


def save(path: Path, completion: Completion) -> None:
    """Keep where a text ended, so that it can go on as if it had not."""
    sampler = completion.sampler
    going_on = {
        "ids": list(completion.unread_ids), "counts": sampler.counts, "seed": sampler.seed, "random": sampler.random,
    }  # fmt: skip
    completion.state.save(path, {"unread": completion.unread, "going_on": json.dumps(going_on)})


def load(path: Path, model: LanguageModel) -> Start:
    """What `save` kept, or any saved state. Raises FormatError where it is not one of this model or is damaged."""
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
    """The file to write: `path`, or what it links to.

    Raises FormatError for one that cannot be written, or that is there and is not one of this kind.
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FormatError(f"{path.parent} is not a folder; make it first, or give another file")
    if path.exists():
        try:
            same = path.is_file() and _kind(State.read_metadata(path)) == kind
        except FormatError:
            same = False
        if not same:
            raise FormatError(f"{path} is there and is not a {kind}; remove it, or give another file")
    return path


def _kind(metadata: Mapping[str, str]) -> str:
    return CACHE if "prompt_cache" in metadata else STATE


class PromptCache:
    """The state after a prompt less its last token, kept in a file for this prompt and all that begin like it.

    The last token is read each time, since that makes the logits that the text starts from. A token gets the same
    bits wherever a prompt is cut, so the text is the one that would be made without a cache.
    """

    def __init__(self, path: Path, model: LanguageModel, start: State, ids: Sequence[int]) -> None:
        """`start` is the state before the first of `ids`, which is left as it is."""
        self.path, self._start, self._ids = path, start, ids
        facts = [model.digest, model.quantization, model.config.as_json(), model.backend.name]
        self._facts = hashlib.sha256(json.dumps(facts).encode())
        for array in start.arrays().values():
            self._facts.update(np.ascontiguousarray(array).data)

    def _key(self, tokens: int) -> str:
        """Digest of all that the state after this many tokens follows from."""
        key = self._facts.copy()
        key.update(np.array(self._ids[:tokens], "<i8").data)
        return key.hexdigest()

    def find(self) -> tuple[State, int]:
        """The state to read on from and how many tokens it has read, 0 if the file knows none of them."""
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
        note(f"{why}; the prompt is read from its beginning")
        return self._start, 0

    def keep(self, completion: Completion) -> None:
        """Have the file written when `completion` has read all of the prompt but its last token."""
        tokens, also = len(self._ids) - 1, completion.on_read

        def write(read: int) -> None:
            if also is not None:
                also(read)
            if read == tokens:
                completion.state.save(self.path, {"prompt_cache": self._key(tokens), "tokens": str(tokens)})

        completion.last_alone, completion.on_read = True, write
