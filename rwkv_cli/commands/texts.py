"""Texts that commands take from their arguments and from standard input, joined as people expect."""

import sys
from collections.abc import Sequence

import click

from rwkv_cli.errors import TokenizerError


def read_text(arguments: Sequence[str], needed: bool) -> bytes:
    """Return the arguments and standard input, joined. One line break at the end of standard input does not count.

    A terminal is read only where "-" asks for it. There a missing text is an empty one, if none is needed.
    """
    piped = b""
    if not sys.stdin.isatty() or "-" in arguments:
        piped = read_input().removesuffix(b"\n").removesuffix(b"\r")
    elif needed and not arguments:
        raise click.UsageError("no text: give one as an argument or on standard input")
    return _joined(arguments, piped)


def read_input() -> bytes:
    """Return all of standard input in UTF-8. Raises ClickException for another encoding that nothing tells."""
    from rwkv_cli.engine.encodings import as_utf8

    try:
        return as_utf8(sys.stdin.buffer.read())
    except TokenizerError as error:
        raise click.ClickException(f"standard input: {error}") from None


def _joined(arguments: Sequence[str], piped: bytes) -> bytes:
    """Join a text's arguments and standard input with blank lines.

    What is piped comes last, or where an argument is "-". Raises UsageError for several texts that no "-" parts.
    """
    if len(arguments) > 1 and "-" not in arguments:
        raise click.UsageError(f"{len(arguments)} texts are given; put quotes around a text that has blanks")
    if arguments.count("-") > 1:
        raise click.UsageError("- is given twice, but standard input can be read once only")
    order = arguments if "-" in arguments else [*arguments, "-"]
    # an argument's own bytes
    texts = [piped if text == "-" else text.encode("utf-8", "surrogateescape") for text in order]
    return b"\n\n".join(text for text in texts if text)
