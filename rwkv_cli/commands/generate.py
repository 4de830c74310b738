"""The command `rwkv generate`."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_cli.commands.batch import answer_file, check_options
from rwkv_cli.commands.options import (
    check_draft,
    check_there,
    draft_options,
    file_option,
    make_ready,
    model_options,
    open_model,
    open_speculation,
    place_of,
    ray_options,
    sampling_options,
    state_option,
    whole_option,
)
from rwkv_cli.commands.texts import read_text
from rwkv_cli.errors import TokenizerError
from rwkv_cli.terminal.compiling import load_kernels
from rwkv_cli.terminal.output import note, reading_bar
from rwkv_cli.terminal.wrap import answer_writer

if TYPE_CHECKING:
    from rwkv_cli.engine.model import LanguageModel
    from rwkv_cli.engine.saved import Start


@click.command("generate")
@click.argument("prompt", nargs=-1, metavar="[PROMPT]")
@model_options
@whole_option("-n", "--max-tokens", default=256, help="End after N tokens.")
@sampling_options
@draft_options
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End before this text; may be given again.")
@click.option(
    "-e",
    "--escape",
    is_flag=True,
    help=r"In PROMPT, --stop and --suffix, \n is a line break; so are \t, \\ and \xHH read.",
)
@click.option(
    "--suffix",
    metavar="TEXT",
    help="Write what comes between PROMPT and this text, in the form that G1c and later models know.",
)
@click.option("--ignore-eos", is_flag=True, help="Go on where the model would end the text.")
@state_option
@file_option(
    "--load-state",
    help="Go on after the text whose state --save-state kept, random numbers too; PROMPT may then be left out.",
)
@file_option("--save-state", help="Keep the state after PROMPT and its text.")
@file_option(
    "--prompt-cache",
    help="Keep the state after PROMPT: the next prompt that begins with all of it reads on from there.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end instead of text as it comes.")
@file_option("--batch", help="Continue all prompts of FILE (- for standard input), a JSON object a line.")
@file_option(
    "-o",
    "--output",
    metavar="OUT",
    help="With --batch: add the answers to OUT; those that it has already are not made again.",
)
@whole_option("--batch-size", default=8, help="With --batch: how many prompts go through the model together.")
@ray_options
def command(
    *,
    prompt: tuple[str, ...],
    model: str | None,
    threads: int | None,
    device: str,
    max_tokens: int,
    stops: tuple[str, ...],
    escape: bool,
    suffix: str | None,
    ignore_eos: bool,
    state: Path | None,
    load_state: Path | None,
    save_state: Path | None,
    prompt_cache: Path | None,
    as_json: bool,
    batch: Path | None,
    output: Path | None,
    batch_size: int,
    ray: str | None,
    ray_workers: int | None,
    seed: int | None,
    draft: str | None,
    lookup: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT and what comes on standard input (one line break at its end does not count).

    Standard input is joined to PROMPT after a blank line. An argument - says where it goes, between two others too.
    The text goes to standard output as it is made, without the prompt. Defaults are the reference's: temperature 1,
    top-p 0.85, presence and frequency penalty 0.2, decaying by 0.996 a token.

    With --batch, FILE holds a JSON object a line: {"prompt": …} and, if wanted, "id" (else the line's number),
    "max_tokens", "seed" and "stop"; other settings are refused, since they are options, and unknown keys are ignored.
    An answer is a JSON object a line too, written when it ends; its text is what the prompt alone would get with that
    seed, and --seed is every prompt's.

    \b
    rwkv generate "Once upon a time" -m stories.safetensors
    cat letter.txt | rwkv generate --max-tokens 100 --temperature 0 > answer.txt
    cat letter.txt | rwkv generate "Here is a letter." - "It is about"
    rwkv generate --batch prompts.jsonl --output answers.jsonl --seed 1
    """
    check_options(click.get_current_context())
    place = place_of(ray, ray_workers, threads, device)
    from rwkv_cli.engine.completion import Completion, Request, new_sampler
    from rwkv_cli.engine.encodings import unescaped
    from rwkv_cli.engine.jobs import JobSettings
    from rwkv_cli.engine.sampling import Sampling
    from rwkv_cli.engine.saved import CACHE, STATE, PromptCache, check_target, save_end
    from rwkv_cli.terminal.slash import drafts

    if state and load_state:
        raise click.UsageError("--state and --load-state exclude each other: a saved state had its beginning")
    if suffix is not None and load_state:
        raise click.UsageError("--suffix and --load-state exclude each other: the suffix comes before all other text")
    if escape:
        prompt, stops = tuple(map(unescaped, prompt)), tuple(map(unescaped, stops))
        suffix = suffix and unescaped(suffix)
    elif (odd := next((stop for stop in stops if "\\" in stop), None)) is not None:
        note(f"--stop {odd} holds a backslash as such; with --escape (-e), \\n is a line break.")
    if any(not stop for stop in stops):
        raise click.BadParameter("an empty text would end at once", param_hint="--stop")
    settings = Sampling().changed(**sampling)
    check_there(state, load_state)
    check_draft(draft, lookup)
    if batch is not None:
        answer_file(
            batch,
            output,
            size=batch_size,
            load=functools.partial(open_model, model, *(("cpu", None) if place else (device, threads))),
            default=JobSettings(max_tokens=max_tokens, seed=seed, stops=stops),
            sampling=settings,
            ignore_eos=ignore_eos,
            state=state,
            place=place,
        )
        return
    if save_state:
        save_state = check_target(save_state, STATE)
    if prompt_cache:
        prompt_cache = check_target(prompt_cache, CACHE)
    if save_state and prompt_cache and os.path.realpath(save_state) == os.path.realpath(prompt_cache):
        raise click.UsageError("--save-state and --prompt-cache name the same file; give each one of its own")
    text = read_text(prompt, needed=load_state is None)
    if not text and load_state is None and suffix is None:
        raise click.UsageError("the prompt is empty; give some text to go on with")
    lm = open_model(model, device, threads)
    load_kernels(lm.text_tokenizer.kernels(len(text)))
    start = _start(lm, state, load_state)
    ids = _encode(lm, start, text, load_state) if suffix is None else _around(lm, text, suffix)
    sampler = new_sampler(lm, settings, start.seed if seed is None else seed)
    sampler.counts = start.counts
    if seed is None and start.random:
        sampler.random = start.random
    cache = PromptCache(prompt_cache, lm, start.state, ids) if prompt_cache else None
    begun, cached = cache.find(warn=note) if cache else (start.state, 0)
    make_ready(lm, "last")
    speculation = open_speculation(lm, draft, lookup, threads)
    if speculation is not None:
        speculation.drafter.read(ids[:cached])
    request = Request(ids[cached:], max_tokens, stops, ignore_eos)
    completion = Completion(lm, begun, sampler, request, speculation=speculation)
    show = answer_writer()
    with reading_bar(len(ids) - cached) as on_read:
        if cache and not cached:
            cache.fill(completion, on_read)
        for piece in completion.stream(on_read):
            if not as_json:
                show(piece)
    result = completion.result
    if as_json:
        facts = {
            "model": str(lm.path),
            "prompt": text.decode("utf-8", "replace"),
            "text": result.text,
            "stop": result.stop,
            "seed": sampler.seed,
            "prompt_tokens": result.prompt_tokens,
            "cached_tokens": cached,
            "tokens": result.tokens,
            "prompt_tokens_per_second": result.prompt_tokens / result.prompt_seconds,
            "tokens_per_second": result.tokens / result.seconds,
        }
        if speculation is not None:
            facts |= {"drafted": result.drafted, "accepted": result.accepted}
        click.echo(json.dumps(facts))
    elif sys.stdout.isatty() and not result.text.endswith("\n"):
        click.echo()
    if speculation is not None and not as_json:
        note(f"{drafts(result)}; {result.tokens / result.seconds:.1f} tok/s.")
    if save_state:
        save_end(save_state, completion)


def _start(lm: LanguageModel, state: Path | None, load_state: Path | None) -> Start:
    """Find where the text begins: after a saved text, at a tuned state, or with the model's own state."""
    from rwkv_cli.engine.saved import Start, load_start
    from rwkv_cli.models.tuned import read_tuned_state

    if load_state:
        return load_start(load_state, lm)
    return Start(read_tuned_state(state, lm) if state else lm.new_state())


def _encode(lm: LanguageModel, start: Start, text: bytes, load_state: Path | None) -> list[int]:
    """Encode what the state has to read first: the end of the text before, and the prompt."""
    try:
        ids = [*start.ids, *lm.text_tokenizer.encode(start.unread.encode() + text)]
    except TokenizerError as error:
        raise click.UsageError(f"the prompt is {error}") from None
    if not ids:
        what = f"the text in {load_state} had come to its end" if load_state else "the prompt is empty"
        raise click.UsageError(f"{what}; give some text to go on with")
    return ids


def _around(lm: LanguageModel, text: bytes, suffix: str) -> list[int]:
    """Encode the prompt for what comes between two texts. Token 0 begins it, as it begins every text in training."""
    from rwkv_cli.engine.g1h import fill_in
    from rwkv_cli.engine.tokenizer import END_OF_TEXT

    try:
        written = fill_in(text.decode("utf-8", "surrogateescape"), suffix)
        return [END_OF_TEXT, *lm.text_tokenizer.encode(written)]
    except TokenizerError as error:
        raise click.UsageError(f"the prompt or the suffix is {error}") from None
