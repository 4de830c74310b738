"""The command `rwkv tokenize`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from rwkv_cli.commands.options import model_option, named_model
from rwkv_cli.commands.texts import read_text
from rwkv_cli.errors import TokenizerError
from rwkv_cli.terminal.compiling import load_kernels
from rwkv_cli.terminal.output import counted, note, one_line

if TYPE_CHECKING:
    from rwkv_cli.engine.tokenizer import Tokenizer

_BLOCK = 1 << 16
"""Bytes of a text that are split at a time."""


@click.command("tokenize")
@click.argument("text", nargs=-1, metavar="[TEXT]")
@model_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object: ids, pieces and count.")
def command(*, text: tuple[str, ...], model: str | None, as_json: bool) -> None:
    """Show the tokens of TEXT and of what comes on standard input. No model runs.

    Each token has a line: its id, and the part of the text that it stands for. Bytes that are no character are shown as
    \\xHH. How many tokens there are goes to standard error. One line break at the end of standard input does not count.

    \b
    rwkv tokenize "Once upon a time"
    rwkv tokenize -m model.int8.safetensors --json < letter.txt
    """
    from rwkv_cli.engine.model import no_tokenizer, read_tokenizer
    from rwkv_cli.quant import Checkpoint

    data = read_text(text, needed=True)
    checkpoint = Checkpoint(named_model(model))
    tokenizer = read_tokenizer(checkpoint)
    if tokenizer is None:
        raise no_tokenizer(checkpoint.path)
    load_kernels(tokenizer.kernels(len(data)))
    ids: list[int] = []
    pieces: list[str] = []
    count, width = 0, len(str(tokenizer.size - 1))
    try:
        for found, texts in _tokens(tokenizer, data):
            count += len(found)
            if as_json:
                ids += found
                pieces += texts
                continue
            rows = zip(found, texts, strict=True)
            lines = [f"{token:{width}}  {one_line(json.dumps(text, ensure_ascii=False))}" for token, text in rows]
            click.echo("\n".join(lines))
    except TokenizerError as error:
        raise click.UsageError(f"the text is {error}") from None
    if as_json:
        click.echo(json.dumps({"ids": ids, "pieces": pieces, "count": count}, ensure_ascii=False))
        return
    note(f"{counted(count, 'token')}, {counted(len(data), 'byte')}")


def _tokens(tokenizer: Tokenizer, data: bytes) -> Iterator[tuple[list[int], list[str]]]:
    """Yield the ids and the parts of a text, some at a time, so that a long one is never held in pieces as a whole."""
    start = 0
    for piece in tokenizer.encode_blocks(data[at : at + _BLOCK] for at in range(0, len(data), _BLOCK)):
        borders = itertools.pairwise([start, *(start + piece.ends).tolist()])
        yield piece.ids, [data[begin:end].decode("utf-8", "backslashreplace") for begin, end in borders]
        start += int(piece.ends[-1]) if piece.ids else 0
