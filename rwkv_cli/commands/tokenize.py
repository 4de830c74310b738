"""The command `rwkv tokenize`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import click

from rwkv_cli.commands.options import named_model
from rwkv_cli.commands.texts import read_text
from rwkv_cli.errors import TokenizerError
from rwkv_cli.terminal.compiling import load_kernels
from rwkv_cli.terminal.output import columns, counted, note


@click.command("tokenize")
@click.argument("text", nargs=-1, metavar="[TEXT]")
@click.option(
    "-m",
    "--model",
    type=click.Path(path_type=Path),
    metavar="MODEL",
    help="Converted model (.safetensors); default: $RWKV_MODEL, else the bundled storyteller.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object: ids, pieces and count.")
def command(*, text: tuple[str, ...], model: Path | None, as_json: bool) -> None:
    """Show the tokens of TEXT and of what comes on standard input. No model runs.

    Each token has a line: its id, and the part of the text that it stands for. Bytes that are no character are shown as
    \\xHH. How many tokens there are goes to standard error. One line break at the end of standard input does not count.

    \b
    rwkv tokenize "Once upon a time"
    rwkv tokenize -m model.int8.safetensors --json < letter.txt
    """
    from rwkv_cli.engine.model import read_tokenizer
    from rwkv_cli.quant import Checkpoint

    data = read_text(text, needed=True)
    checkpoint = Checkpoint(named_model(model))
    tokenizer = read_tokenizer(checkpoint)
    if tokenizer is None:
        raise click.ClickException(f"{checkpoint.path}: has no tokenizer; convert it again with --tokenizer PATH")
    load_kernels(tokenizer.kernels(len(data)))
    try:
        ids, ends = tokenizer.split(data)
    except TokenizerError as error:
        raise click.UsageError(f"the text is {error}") from None
    borders = itertools.pairwise([0, *ends.tolist()])
    pieces = [data[begin:end].decode("utf-8", "backslashreplace") for begin, end in borders]
    if as_json:
        click.echo(json.dumps({"ids": ids, "pieces": pieces, "count": len(ids)}, ensure_ascii=False))
        return
    if ids:
        rows = [(token, json.dumps(piece, ensure_ascii=False)) for token, piece in zip(ids, pieces, strict=True)]
        click.echo(columns(rows, right=[0]))
    note(f"{counted(len(ids), 'token')}, {counted(len(data), 'byte')}")
