"""Tokenizers, from text to token ids and back: RWKV World, any tokenizer.json, or plain bytes.

Every kind has `encode`, `decode`, `stream` (ids to text as they come, never half a character) and `encode_blocks`
(a text of any size in constant memory).
"""

import ast
import codecs
import functools
import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import TokenizerError

if TYPE_CHECKING:
    from rwkv_cli.kernels.contract import Loadable
    from rwkv_cli.kernels.cpu.longest_match import LongestMatch

END_OF_TEXT = 0
"""The token that ends a text in every official vocabulary."""

_LONG = 1 << 15
"""Bytes from which a text is worth compiled code: to load that takes as long as to split this many without it."""


class Piece(NamedTuple):
    """Some tokens of a text, and the bytes of the text that end with each of them, from the piece's start."""

    ids: list[int]
    ends: NDArray[np.int64]


class TextStream(Protocol):
    """A text that grows with each id."""

    @property
    def unfinished(self) -> bool:
        """True if ids have come whose text is not certain yet."""

    def push(self, token: int) -> str:
        """Take an id, and return the text that is certain now. It is empty while a character is not whole."""

    def flush(self) -> str:
        """Return the rest at the end, an unfinished character as U+FFFD."""


class Tokenizer(Protocol):
    """The interface of every tokenizer. Its `kind` is the name in a converted file."""

    kind: str

    @property
    def size(self) -> int:
        """One more than the largest id."""

    def encode(self, text: str | bytes) -> list[int]:
        """Turn a text into ids. In a str, a surrogate that stands for a byte (PEP 383) is that byte.

        Raises TokenizerError for bytes that are not UTF-8 where the vocabulary needs text.
        """

    def split(self, text: str | bytes) -> Piece:
        """Encode a text, and say which bytes of it each token stands for."""

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text. Invalid UTF-8 becomes U+FFFD."""

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        """Begin a text that grows with each id. It joins the text of the ids `before` as `decode` joins the two."""

    def kernels(self, size: int) -> list["Loadable"]:
        """List the kernels that the encoding of so many bytes needs."""

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[Piece]:
        """Yield the tokens of the text that `blocks` make up. The whole text is never held."""


def to_bytes(text: str | bytes) -> bytes:
    """Return the bytes of a text. Raises TokenizerError for half a surrogate pair."""
    try:
        return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)
    except UnicodeEncodeError as error:
        raise TokenizerError(f"character {error.start} is half a surrogate pair; UTF-8 has no such thing") from None


class _ByteStream:
    """An incremental UTF-8 decoder over a table of each token's bytes."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def unfinished(self) -> bool:
        return self._decoder.getstate()[0] != b""

    def push(self, token: int) -> str:
        return self._decoder.decode(self._table[token] if 0 <= token < len(self._table) else b"")

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _ByteTable:
    """A vocabulary made of byte strings. `table[id]` is a token's bytes, empty where there is no token."""

    kind: str
    table: list[bytes]

    @property
    def size(self) -> int:
        return len(self.table)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Turn ids into their exact bytes. Ids without a token, like 0 in World, stand for none."""
        size = len(self.table)
        return b"".join(self.table[i] for i in ids if 0 <= i < size)

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def kernels(self, size: int) -> list["Loadable"]:  # noqa: ARG002 - bytes need none
        return []

    def stream(self, before: Sequence[int] = ()) -> TextStream:  # noqa: ARG002 - bytes join as they are
        return _ByteStream(self.table)


class ByteTokenizer(_ByteTable):
    """The tokenizer whose ids are bytes."""

    kind = "bytes"

    def __init__(self) -> None:
        self.table = [bytes([i]) for i in range(256)]

    def encode(self, text: str | bytes) -> list[int]:
        return list(to_bytes(text))

    def split(self, text: str | bytes) -> Piece:
        ids = self.encode(text)
        return Piece(ids, np.arange(1, len(ids) + 1))

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[Piece]:
        return map(self.split, blocks)


class WorldTokenizer(_ByteTable):
    """RWKV World, a greedy longest match over bytes (rwkv package, rwkv_tokenizer.py).

    Any bytes round-trip, unless a vocabulary of its own lacks some.
    """

    kind = "world"

    def __init__(self, table: list[bytes]) -> None:
        self.table = table
        self._ids = {token: i for i, token in enumerate(table) if token}
        self._longest = max(map(len, table))
        # This maps two first bytes to the lengths of tokens that begin so, longest first.
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {head: sorted(found, reverse=True) for head, found in lengths.items() if len(head) == 2}
        if not self._ids:
            raise TokenizerError("a vocabulary without tokens")

    def encode(self, text: str | bytes) -> list[int]:
        return self.split(text).ids

    def split(self, text: str | bytes) -> Piece:
        data = to_bytes(text)
        return self._match(data, len(data))

    def _match(self, data: bytes, stop: int) -> Piece:
        """Return the tokens that start before `stop`. Raises TokenizerError where none fits."""
        if stop < _LONG:
            ids, ends = self._match_short(data, stop)
        else:
            ids, ends = self._compiled.split(data, stop)
        at = int(ends[-1]) if ids else 0
        if at < stop:
            raise TokenizerError(
                f"beyond this model's vocabulary, which has no token for {data[at : at + 8]!r}; leave that out"
            )
        return Piece(ids, ends)

    def _match_short(self, data: bytes, stop: int) -> tuple[list[int], NDArray[np.int64]]:
        """Do what `LongestMatch.split` does, without any compiled code."""
        ids, lengths = self._ids, self._lengths
        out: list[int] = []
        ends: list[int] = []
        at = 0
        while at < stop:
            for n in lengths.get(data[at : at + 2], ()):
                token = ids.get(data[at : at + n])
                # A slice past the end is shorter than n. It may match a shorter token, and then it is that token.
                if token is not None:
                    break
            else:
                token = ids.get(data[at : at + 1])
                if token is None:
                    break
            out.append(token)
            at += len(self.table[token])
            ends.append(at)
        return out, np.array(ends, np.int64)

    def kernels(self, size: int) -> list["Loadable"]:
        if size < _LONG:
            return []
        from rwkv_cli.kernels.cpu.longest_match import SPLITTING

        return [SPLITTING]

    @functools.cached_property
    def _compiled(self) -> "LongestMatch":
        from rwkv_cli.kernels.cpu.longest_match import LongestMatch

        return LongestMatch(self.table)

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[Piece]:
        rest = b""
        for block in blocks:
            data = rest + block
            # A token that starts before this border cannot depend on bytes that have not come.
            piece = self._match(data, max(0, len(data) - self._longest))
            rest = data[piece.ends[-1] :] if piece.ids else data
            if piece.ids:
                yield piece
        if rest:
            yield self.split(rest)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays in a converted file: all tokens' bytes in the order of their ids, and their lengths."""
        return {
            "tokenizer.bytes": np.frombuffer(b"".join(self.table), np.uint8),
            "tokenizer.lengths": np.array([len(token) for token in self.table], np.uint8),
        }

    @classmethod
    def from_arrays(cls, data: NDArray[np.uint8], lengths: NDArray[np.uint8]) -> "WorldTokenizer":
        """Read what `arrays` returned. Raises TokenizerError for damaged arrays."""
        if data.dtype != np.uint8 or lengths.dtype != np.uint8 or not lengths.size or lengths.sum() != data.size:
            raise TokenizerError("its token lengths do not add up")
        raw, ends = data.tobytes(), np.cumsum(lengths, dtype=np.int64).tolist()
        return cls([raw[a:b] for a, b in itertools.pairwise([0, *ends])])

    @classmethod
    def from_json(cls, vocabulary: Mapping[str, Any], name: str) -> "WorldTokenizer":
        """Read a vocabulary as web-rwkv and RWKV-LM have it: each id with its text, or with the list of its bytes."""
        table: dict[int, bytes] = {0: b""}
        for key, value in vocabulary.items():
            try:
                token = value.encode() if isinstance(value, str) else bytes(value if isinstance(value, list) else [])
            except (TypeError, ValueError):
                token = b""
            if len(key) > 6 or not 0 < len(token) < 256:
                raise TokenizerError(f"{name}: not a vocabulary: token {key:.20} is {value!r:.40}")
            table[int(key)] = token
        return cls([table.get(i, b"") for i in range(max(table) + 1)])

    @classmethod
    def from_vocabulary(cls, path: Path) -> "WorldTokenizer":
        """Read a vocabulary in the official text form: `id literal length` a line, with ids from 1."""
        table: dict[int, bytes] = {0: b""}
        line = ""
        try:
            for line in path.read_text(encoding="utf-8").split("\n"):
                if not line:
                    continue
                head, tail = line.index(" "), line.rindex(" ")
                literal = ast.literal_eval(line[head:tail].strip())
                token = literal.encode() if isinstance(literal, str) else literal
                if not isinstance(token, bytes) or len(token) != int(line[tail:]) or not 0 < len(token) < 256:
                    raise ValueError("the token and its length disagree")
                if not 0 < (index := int(line[:head])) < 1 << 20 or index in table:
                    raise ValueError("the id is out of range or there twice")
                table[index] = token
        except (
            ValueError,
            TypeError,
            SyntaxError,
            MemoryError,
            RecursionError,
        ) as error:  # literal_eval raises all five
            raise TokenizerError(f"{path}: not a World vocabulary: line {line[:40]!r} ({error})") from None
        try:
            return cls([table.get(i, b"") for i in range(max(table) + 1)])
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from None


def official_vocabulary() -> Path:
    """Find the World vocabulary in the PyPI package `rwkv`, without importing that."""
    spec = importlib.util.find_spec("rwkv")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found = sorted(Path(folder).glob("rwkv_vocab_v*.txt"))
        if found:
            return found[-1]
    raise TokenizerError("the World vocabulary is missing: reinstall it with pip install rwkv")
