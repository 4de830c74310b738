"""Texts from outside, brought to UTF-8: byte order marks are read, and UTF-16 is never taken for UTF-8."""

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator

from rwkv_cli.errors import TokenizerError

_MARKS = {
    codecs.BOM_UTF8: "",
    codecs.BOM_UTF32_LE: "utf-32",  # begins as the next one does, so it stands before that
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks, and the encodings that they tell. UTF-8 needs no decoding."""

_LOOKED_AT = 1 << 12
"""Bytes at the beginning of a text that tell UTF-16 without a mark."""


def utf8_blocks(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the text that `blocks` make up in UTF-8, without its byte order mark.

    Other bytes are passed on unchanged. Raises TokenizerError for a text that is not in the encoding that its mark
    tells, and for UTF-16 without a mark.
    """
    rest = iter(blocks)
    first = b""
    for block in rest:
        first += block
        if not any(mark.startswith(first) for mark in _MARKS):
            break
    mark = next((mark for mark in _MARKS if first.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "")
    if not encoding:
        _check_not_utf16(first)
        yield first.removeprefix(mark)
        yield from rest
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for block in itertools.chain([first], rest):
            yield decoder.decode(block).encode()
        yield decoder.decode(b"", final=True).encode()
    except UnicodeError:
        name = encoding.upper()
        raise TokenizerError(f"begins as {name} and is damaged; save it as UTF-8") from None


def as_utf8(data: bytes) -> bytes:
    """Return a whole text as `utf8_blocks` does."""
    return b"".join(utf8_blocks([data]))


def _check_not_utf16(first: bytes) -> None:
    """Raise TokenizerError if every second byte is zero more often than not, and no other byte is."""
    head = first[:_LOOKED_AT]
    even, odd = sorted((head[::2].count(0), head[1::2].count(0)))
    if even == 0 and odd * 4 > len(head) >= 4:
        raise TokenizerError("looks like UTF-16 without a byte order mark; save it as UTF-8")


_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", "'": "'", '"': '"'}


def unescaped(text: str) -> str:
    r"""Return a text with \n, \r, \t, \\, \', \" and \xHH in place of what they stand for. Others stay as they are.

    A byte that is no ASCII is a surrogate, as in arguments of a command line, until its character is whole.
    """

    def meant(found: re.Match[str]) -> str:
        if found[2]:
            return bytes([int(found[2], 16)]).decode("utf-8", "surrogateescape")
        return _ESCAPES[found[1]]

    whole = re.sub(r"""\\(?:([nrt\\'"])|x([0-9a-fA-F]{2}))""", meant, text)
    return whole.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
