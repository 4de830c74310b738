"""rwkv generate"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from rwkv_cli.options import model_options, open_model, sampling_options


@click.command("generate")
@click.argument("prompt", required=False)
@model_options
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="N",
    help="End after N tokens.",
)
@sampling_options
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End before this text; may be given again.")
@click.option("--ignore-eos", is_flag=True, help="Go on where the model would end the text.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end instead of text as it comes.")
def command(
    prompt: str | None,
    model: Path,
    threads: int | None,
    device: str,
    max_tokens: int,
    stops: tuple[str, ...],
    ignore_eos: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue PROMPT, or what comes on standard input (one line break at its end does not count).

    The text goes to standard output as it is made, without the prompt. Defaults are the reference's: temperature 1,
    top-p 0.85, presence and frequency penalty 0.2, decaying by 0.996 a token.

    \b
    rwkv generate "Once upon a time" -m stories.safetensors
    cat letter.txt | rwkv generate --max-tokens 100 --temperature 0 > answer.txt
    """  # fmt: skip
    from rwkv_cli.engine import Completion, new_sampler
    from rwkv_cli.sampling import Sampling
    from rwkv_cli.terminal import write
    from rwkv_cli.tokenizer import TokenizerError

    text = read_prompt(prompt)
    if any(not stop for stop in stops):
        raise click.BadParameter("an empty text would end at once", param_hint="--stop")
    lm = open_model(model, device, threads)
    try:
        ids = lm.text_tokenizer.encode(text)
    except TokenizerError as error:
        raise click.UsageError(f"the prompt is {error}") from None
    if not ids:
        raise click.UsageError("the prompt is empty: give some text to continue")
    seed = options.pop("seed")
    settings = replace(Sampling(), **{name: value for name, value in options.items() if value is not None})
    sampler = new_sampler(lm, settings, seed)
    completion = Completion(lm, lm.new_state(), sampler, max_tokens, stops, ignore_eos)
    for piece in completion.run(ids):
        if not as_json:
            write(piece)
    if as_json:
        click.echo(json.dumps({
            "model": str(model),
            "prompt": text.decode("utf-8", "replace"),
            "text": completion.text,
            "stop": completion.stop,
            "seed": sampler.seed,
            "prompt_tokens": completion.prompt_tokens,
            "tokens": completion.tokens,
            "prompt_tokens_per_second": completion.prompt_tokens / completion.prompt_seconds,
            "tokens_per_second": completion.tokens / completion.seconds,
        }))  # fmt: skip
    elif sys.stdout.isatty() and not completion.text.endswith("\n"):
        click.echo()


def read_prompt(prompt: str | None) -> bytes:
    """The argument, or standard input to its end, less one line break."""
    if prompt is not None and prompt != "-":
        return prompt.encode("utf-8", "surrogateescape")  # the argument's own bytes
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("no prompt: give one as an argument or on standard input")
    data = sys.stdin.buffer.read()
    return data.removesuffix(b"\n").removesuffix(b"\r")
