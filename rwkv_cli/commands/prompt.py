"""The command `rwkv prompt`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rwkv_cli.commands.options import file_option, model_option, named_model, template_options
from rwkv_cli.commands.texts import read_input
from rwkv_cli.terminal.output import note, write


@click.command("prompt")
@click.argument("messages", type=click.Path(path_type=Path), metavar="MESSAGES.json")
@model_option
@template_options
@file_option("--tools", help="Tools that the model may call, as JSON.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: text, ids and stop.")
def command(
    *,
    messages: Path,
    model: str | None,
    template: str | None,
    style: str | None,
    think: str | None,
    tools: Path | None,
    as_json: bool,
) -> None:
    """Show exactly what a model reads of a chat, up to the answer. No model runs.

    MESSAGES.json (- for standard input) has messages as OpenAI's interface takes them: a list of {"role": …,
    "content": …}, or an object with "messages" and perhaps "tools". The text goes to standard output, and the ids and
    what ends the answer go to standard error.

    \b
    echo '[{"role": "user", "content": "Hello"}]' | rwkv prompt - --template g1h
    rwkv prompt messages.json -m rwkv7-g1k-2.9b.int8.safetensors --think off
    """
    from rwkv_cli.engine.messages import read_chat
    from rwkv_cli.engine.model import no_tokenizer, read_tokenizer
    from rwkv_cli.engine.stored import StoredTemplate
    from rwkv_cli.quant import Checkpoint

    if str(messages) == "-":
        data, name = read_input(), "standard input"
    else:
        data, name = messages.read_bytes(), str(messages)
    chat = read_chat(data, name, (tools.read_bytes(), str(tools)) if tools is not None else None)
    checkpoint = Checkpoint(named_model(model))
    tokenizer = read_tokenizer(checkpoint)
    form = StoredTemplate.of(checkpoint).template(template, style).for_chat(chat)
    text = form.whole(chat, think or form.default_think)
    if tokenizer is None:
        raise no_tokenizer(checkpoint.path)
    ids = [*form.first_ids, *form.encode(tokenizer, text)]
    stop = form.stops[0] if len(form.stops) == 1 else list(form.stops)
    if as_json:
        click.echo(json.dumps({"text": text, "ids": ids, "stop": stop}, ensure_ascii=False))
        return
    write(text)
    click.echo()
    note(f"ids: {' '.join(map(str, ids))}")
    note(f"stop: {json.dumps(stop, ensure_ascii=False)}")
