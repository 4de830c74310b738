"""Any tokenizer.json, by the library `tokenizers`."""

import codecs
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_cli.engine.tokenizer import Piece, TextStream, to_bytes
from rwkv_cli.errors import FormatError, TokenizerError

if TYPE_CHECKING:
    from rwkv_cli.kernels.contract import Loadable

_MOST_HELD = 64
"""Ids that may wait for the end of a character. Bytes that are no UTF-8 would wait forever."""

_SAMPLE = "The quick brown fox, 0123456789.\n\n\tÜber é 你好 🙂 \x00"
"""A text with all kinds of characters, to try a tokenizer on."""


class _JsonStream:
    """A text that a tokenizer.json decodes with each id.

    Each id is decoded behind those of the last piece, since a decoder may treat the beginning of a text in its own way.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int]) -> None:
        self._decode = decode
        self._last = list(before[-_MOST_HELD:])
        """The ids of the last piece, or those before the text."""
        self._held: list[int] = []
        """The ids after them."""

    @property
    def unfinished(self) -> bool:
        return bool(self._held)

    def push(self, token: int) -> str:
        self._held.append(token)
        text = self._text()
        if not text or (text.endswith("\ufffd") and len(self._held) < _MOST_HELD):
            return ""
        self._last, self._held = self._held, []
        return text

    def flush(self) -> str:
        text = self._text() if self._held else ""
        self._last, self._held = self._held, []
        return text

    def _text(self) -> str:
        """Decode the held ids. Bytes that are no UTF-8 change the text before them, but that is out already."""
        before, whole = self._decode(self._last), self._decode([*self._last, *self._held])
        return whole[len(before) :] if whole.startswith(before) else self._decode(self._held)


class JsonTokenizer:
    """A Hugging Face tokenizer.json, run by the `tokenizers` library."""

    kind = "json"

    def __init__(self, text: bytes, name: str, owner: str | None = None) -> None:
        """`name` is the file's in errors, and `owner` the name of the file that it lies in."""
        import tokenizers

        self.owner = owner or name
        try:
            with _unheard():
                self._tokenizer = tokenizers.Tokenizer.from_buffer(text)
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # the library raises bare Exception, and BaseException where Rust panics
            raise TokenizerError(f"{name}: not a tokenizer.json ({_one_line(error)})") from None
        # A file may ask for both, which are for training.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.text = text
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def _text(self, text: str | bytes) -> str:
        """Decode UTF-8. Raises TokenizerError for other bytes."""
        try:
            return to_bytes(text).decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"not UTF-8 at byte {error.start}; this model's tokenizer takes text only") from None

    def encode(self, text: str | bytes) -> list[int]:
        ids: list[int] = self._encoded(self._text(text)).ids
        return ids

    def split(self, text: str | bytes) -> Piece:
        return self._piece(self._text(text))

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if 0 <= i < self.size]
        with self._sound("decode"):
            text: str = self._tokenizer.decode(known, skip_special_tokens=False)
        return text

    def kernels(self, size: int) -> list["Loadable"]:  # noqa: ARG002 - the library is compiled
        return []

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        return _JsonStream(self.decode, before)

    def check(self) -> None:
        """Try the tokenizer on a text, and on all of its tokens. Raises FormatError if it fails."""
        with _unheard():
            self.decode(self.encode(_SAMPLE))
            self.decode(range(self.size))

    def _encoded(self, text: str) -> Any:
        """Return the library's encoding. Raises FormatError where the tokenizer fails."""
        with self._sound("encode"):
            return self._tokenizer.encode(text, add_special_tokens=False)

    @contextmanager
    def _sound(self, what: str) -> Iterator[None]:
        """Turn whatever the library raises into a FormatError that names the file."""
        try:
            yield
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # the library raises bare Exception, and BaseException where Rust panics
            raise FormatError(
                f"{self.owner}: its tokenizer cannot {what} ({_one_line(error)}); "
                "convert the model with a sound one: --tokenizer PATH"
            ) from None

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[Piece]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        rest, read, done = "", 0, 0
        for block in itertools.chain(blocks, [None]):
            try:
                text = rest + decoder.decode(block or b"", final=block is None)
            except UnicodeDecodeError as error:
                raise TokenizerError(
                    f"not UTF-8 at byte {done + error.start}; this model's tokenizer takes text only"
                ) from None
            read += len(block or b"")
            done = read - len(decoder.getstate()[0])  # positions in the next error count from the bytes decoded
            cut = len(text) if block is None else _word_border(text)
            if cut:
                yield self._piece(text[:cut])
            rest = text[cut:]

    def _piece(self, text: str) -> Piece:
        """Encode a part of a text, with the bytes that end with each token."""
        encoded = self._encoded(text)
        # This counts the UTF-8 bytes up to each character, by its code point.
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        width = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
        upto = np.concatenate([[0], np.cumsum(width)])
        stops = np.array([end for _, end in encoded.offsets], np.int64)
        stops[-1:] = len(text)  # offsets may leave out blanks at the end
        return Piece(encoded.ids, upto[np.maximum.accumulate(stops)])


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep from standard error what the library writes there where its code panics. The exception says it, too."""
    try:
        before = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _one_line(error: BaseException) -> str:
    """Return the beginning of an error's text."""
    return " ".join(str(error).split())[:200]


def _word_border(text: str) -> int:
    """Return where a text may be cut: at the last single space between two visible characters.

    Such a space starts a token in byte-level BPE. A text without one waits for more (0), until it has a megabyte.
    """
    at = len(text)
    while (at := text.rfind(" ", 0, at)) > 0:
        if at + 1 < len(text) and not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
    return len(text) if len(text) > 1 << 20 else 0
