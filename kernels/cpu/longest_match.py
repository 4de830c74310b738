"""Greedy longest match of byte strings against a vocabulary, over a trie in arrays.

A node of the trie is a number, and the root is 0. Its edges lie in one hash table: a slot of it is
(node << 8 | byte) << 32 | child, or 0 where it is free. A child is never 0, so a slot in use is not 0 either.

The hash is a multiplication by an odd number that each table draws for itself. So no vocabulary can be made whose edges
all fall on the same slots, which would take hours to build.
"""

import functools
import secrets
from typing import Any

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from rwkv_cli.kernels.cpu.compile import cached, function

_BYTES = types.Array(types.uint8, 1, "C", readonly=True)
_I64 = types.Array(types.int64, 1, "C")

_AT_ONCE = 1 << 16
"""The most tokens that are found in one call of the compiled function."""


@function()
def _slot(slots, factor, key):
    """Find the slot of an edge, or the free one that it would take."""
    mask = len(slots) - 1
    at = ((key * factor) >> np.int64(24)) & mask
    while slots[at] != 0 and slots[at] >> 32 != key:
        at = (at + 1) & mask
    return at


def _build(data, ends, slots, ids, factor):
    """Write the trie of the tokens that end at `ends` of `data` into slots and ids, both full of 0 and -1 before.

    ids[node] is the last token that is spelled so, -1 where none is.
    """
    nodes = 1
    begin = 0
    for token in range(len(ends)):
        node = 0
        for i in range(begin, ends[token]):
            key = (node << 8) | np.int64(data[i])
            at = _slot(slots, factor, key)
            if slots[at] == 0:
                slots[at] = (key << 32) | nodes
                nodes += 1
            node = slots[at] & np.int64(0xFFFFFFFF)
        if node > 0:
            ids[node] = token
        begin = ends[token]


def _match(data, begin, stop, trie, found):
    """Find the tokens that start from `begin` and before `stop`, as many as `found` takes.

    trie is slots, ids, factor; found is tokens [N], ends [N]. Returns how many were found. Fewer than N that do not
    reach `stop` say that no token fits where the last one ends.
    """
    slots, ids, factor = trie
    tokens, ends = found
    count = 0
    at = begin
    while at < stop and count < len(tokens):
        node, token, end, i = np.int64(0), np.int64(-1), at, at
        while i < len(data):
            edge = slots[_slot(slots, factor, (node << 8) | np.int64(data[i]))]
            if edge == 0:
                break
            node = edge & np.int64(0xFFFFFFFF)
            i += 1
            if ids[node] >= 0:
                token, end = ids[node], i
        if token < 0:
            break
        tokens[count], ends[count] = token, end
        count += 1
        at = end
    return count


@functools.cache
def _compiled() -> tuple[Any, Any]:
    pair = types.UniTuple(_I64, 2)
    trie = types.Tuple([_I64, _I64, types.int64])
    build: Any = types.void(_BYTES, _I64, _I64, _I64, types.int64)
    match: Any = types.int64(_BYTES, types.int64, types.int64, trie, pair)
    compiled = [
        cached(lambda name=name, f=f: njit(name, nogil=True, error_model="numpy", cache=True)(f))  # type: ignore[misc]
        for name, f in ((build, _build), (match, _match))
    ]
    return compiled[0], compiled[1]


class _Own:
    """The code that splits texts."""

    def load(self) -> None:
        """Compile it, or read it from the cache."""
        _compiled()


SPLITTING = _Own()
"""The kernel of `LongestMatch`."""


class LongestMatch:
    """A vocabulary, ready to split byte strings into its tokens."""

    def __init__(self, table: list[bytes]) -> None:
        """`table[id]` is a token's bytes, empty where there is no token. Of equal ones, the last counts."""
        data = np.frombuffer(b"".join(table), np.uint8)
        slots = np.zeros(1 << (2 * len(data)).bit_length(), np.int64)
        ids = np.full(len(data) + 1, -1, np.int64)
        build, self._match = _compiled()
        factor = secrets.randbits(62) | 1
        build(data, np.cumsum([len(token) for token in table], dtype=np.int64), slots, ids, factor)
        self._trie = slots, ids, factor

    def split(self, data: bytes, stop: int) -> tuple[list[int], NDArray[np.int64]]:
        """Return the tokens that start before `stop`, and where each ends.

        The last one ends before `stop` where no token fits behind it.
        """
        text = np.frombuffer(data, np.uint8)
        tokens, ends = list[int](), list[NDArray[np.int64]]()
        found = np.empty((2, _AT_ONCE), np.int64)
        at = 0
        while at < stop:
            count = self._match(text, at, stop, self._trie, (found[0], found[1]))
            if count == 0:
                break
            tokens += found[0, :count].tolist()
            ends.append(found[1, :count].copy())
            at = int(ends[-1][-1])
        return tokens, np.concatenate(ends) if ends else np.empty(0, np.int64)
