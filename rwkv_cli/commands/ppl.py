"""The command `rwkv ppl`."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rwkv_cli.commands.options import (
    check_there,
    compare_option,
    file_option,
    make_ready,
    model_options,
    open_model,
    place_of,
    plot_option,
    ray_options,
    whole_option,
)
from rwkv_cli.terminal.output import columns, crew_text, note, one_line, progress_bar
from rwkv_cli.terminal.plot import plot_nll

if TYPE_CHECKING:
    from rwkv_cli.engine.cluster import Place
    from rwkv_cli.engine.errands import Scoring
    from rwkv_cli.engine.handed import Handed
    from rwkv_cli.engine.model import LanguageModel
    from rwkv_cli.engine.scoring import Score


def _start_token(_ctx: click.Context, _param: click.Parameter, value: str) -> int | None:
    """Read a token id, or none."""
    if not value.isdecimal() and value != "none":
        raise click.BadParameter(f"{value!r} is neither a token id nor none")
    return None if value == "none" else int(value)


@click.command("ppl")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="FILE...")
@model_options
@compare_option("Score this model too, on the same tokens, and say how far MODEL is from it.")
@whole_option(
    "--context", help="Forget everything after every N tokens; default: the state is carried through the file."
)
@click.option(
    "--start-token",
    callback=_start_token,
    default="0",
    show_default=True,
    metavar="ID|none",
    help="Token before each text (0 ends a text), or none: the first token is then not scored.",
)
@whole_option("--limit", help="Score the first N tokens of each file only.")
@plot_option("NLL by position in the context, a line for each text and model")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="One JSON object a file; by_position lists [first, last, tokens, NLL, its standard error].",
)
@file_option(
    "-o",
    "--output",
    metavar="OUT",
    help="Add each score to OUT as JSON; texts whose scores it has already are not scored again.",
)
@ray_options
def command(
    *,
    files: tuple[Path, ...],
    model: str | None,
    threads: int | None,
    device: str,
    compare: str | None,
    context: int | None,
    start_token: int | None,
    limit: int | None,
    plot: Path | None,
    as_json: bool,
    output: Path | None,
    ray: str | None,
    ray_workers: int | None,
) -> None:
    """Measure perplexity on text files of any size (- for standard input), each read once in constant memory.

    With --compare, OTHER is the reference: KL is KL(OTHER ‖ MODEL), and differences are MODEL minus OTHER.

    \b
    rwkv ppl wiki.test.raw -m int8.safetensors
    rwkv ppl wiki.test.raw -m int8.safetensors --compare float.safetensors
    rwkv ppl wiki.test.raw -m int8.safetensors --context 1024 --plot nll.svg
    rwkv ppl texts/*.txt -m int8.safetensors --output scores.jsonl --ray HOST:6379
    """
    from rwkv_cli.engine.errands import Scoring
    from rwkv_cli.engine.handed import Handed
    from rwkv_cli.engine.records import open_records
    from rwkv_cli.engine.scores import Scores, score_digest, score_record

    place = place_of(ray, ray_workers, threads, device)
    if (place or output) and Path("-") in files:
        raise click.UsageError(f"- does not go with {'--ray' if place else '--output'}; name a file")
    check_there(*files)
    here = ("cpu", None) if place else (device, threads)
    lm = open_model(model, *here)
    other = open_model(compare, *here) if compare is not None else None
    if start_token is not None and start_token >= lm.config.vocab:
        raise click.BadParameter(
            f"{start_token} is outside the vocabulary of {lm.config.vocab}", param_hint="--start-token"
        )
    if other is not None:
        _check_same_tokens(lm, other)
    for target, option in ((plot, "--plot"), (output, "--output")):
        if target is not None and target.exists() and any(file.exists() and target.samefile(file) for file in files):
            raise click.BadParameter(f"{target} is one of the texts; name another file", param_hint=option)
    if files.count(Path("-")) > 1:
        raise click.UsageError("- is given twice, but standard input can be read once only")
    models = [lm] if other is None else [lm, other]
    work = Scoring(tuple(Handed.model(each.path) for each in models), context, start_token, limit)
    texts = [Handed.text(file) for file in files] if place or output else []
    digests = (
        [score_digest(models, *pair, [context, start_token, limit]) for pair in zip(files, texts, strict=True)]
        if output
        else []
    )
    kept = Scores(lm.path, dict(zip(digests, files, strict=False)))
    scores: list[tuple[Path, Score]] = []
    # A progress bar takes the place of standard output. That is right for a terminal, which gets texts above the bar.
    out = None if sys.stdout.isatty() else sys.stdout
    with nullcontext() if output is None else open_records(output, kept) as record:
        known = [record.found.get(digest) for digest in digests] if record else [None] * len(files)
        todo = [number for number, score in enumerate(known) if score is None]
        left = [files[number] for number in todo]
        if place is None:
            news = _score_here(models, left, work)
        else:
            news = _spread(left, [texts[number] for number in todo], work, place)
        try:
            for number, (file, score) in enumerate(zip(files, known, strict=True)):
                if score is None:
                    score = next(news)
                    if record is not None:
                        record.add(kept.line(digests[number], score))
                scores.append((file, score))
                if as_json:
                    click.echo(json.dumps(score_record(lm.path, file, score)), file=out)
                else:
                    click.echo(("\n" if len(scores) > 1 else "") + report(file, score, compare), file=out)
        except KeyboardInterrupt:
            if output is not None:
                note(f"{len(scores)} of {len(files)} texts are scored; the same command does the rest")
            raise click.Abort from None
    if len(scores) > 1 and not as_json:
        click.echo("\n" + total([score for _, score in scores]))
    if plot is not None:
        plot_nll(plot, scores, [each.path for each in models])


def _score_here(models: list[LanguageModel], files: list[Path], work: Scoring) -> Iterator[Score]:
    """Score files with this process."""
    from rwkv_cli.engine.scoring import comparing_kernels
    from rwkv_cli.terminal.compiling import load_kernels

    if not files:
        return
    most = max(map(_most_bytes, files))
    if len(models) == 1:
        make_ready(models[0], "losses", text_bytes=most)
    else:
        load_kernels([*models[0].text_tokenizer.kernels(most), *comparing_kernels(models)])
        for each in models:
            each.prepare("every")
    for file in files:
        yield _score(file, models, work)


def _most_bytes(file: Path) -> int:
    """The most bytes of UTF-8 that a text may have. A text in UTF-16 grows by up to a half, and a pipe has no size."""
    return 2 * file.stat().st_size if str(file) != "-" and file.is_file() else sys.maxsize


def _check_same_tokens(lm: LanguageModel, other: LanguageModel) -> None:
    """Refuse two models whose tokens do not compare."""
    a, b = lm.text_tokenizer, other.text_tokenizer
    same = a.kind == b.kind and lm.config.vocab == other.config.vocab
    if not same or any(getattr(a, content, None) != getattr(b, content, None) for content in ("table", "text")):
        raise click.ClickException(f"{lm.path} and {other.path} have different tokenizers; their tokens do not compare")


def _score(file: Path, models: list[LanguageModel], work: Scoring) -> Score:
    """Score a file behind a progress bar, with a note on characters that few would want to score."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    scorer = work.scorer(models)
    piped = str(file) == "-"
    name = "standard input" if piped else one_line(file.name)
    text = "{task.percentage:.0f} %  {task.fields[rate]}"
    with progress_bar(
        TextColumn("{task.description}", markup=False), BarColumn(), text, TimeRemainingColumn()
    ) as progress:
        task = progress.add_task(name, total=None if piped else 1.0, rate="")

        def show(share: float, score: Score) -> None:
            progress.update(task, completed=share, rate=f"{score.tokens_per_second:.0f} tok/s  ppl {score.ppl:.4g}")

        if piped:
            score = scorer.score_stream(sys.stdin.buffer, name, 0, show)
        else:
            score = scorer.score(file, show)
    _remark(file, scorer.carriage_returns, scorer.zeros)
    return score


def _remark(file: Path, carriage_returns: bool, zeros: bool) -> None:
    """Note what a text holds that few would want to score."""
    if carriage_returns:
        note(f"{one_line(file)} has line breaks of Windows (CRLF), and each carriage return is scored too.")
    if zeros:
        note(f"{one_line(file)} has NUL characters, which are scored too.")


def _spread(files: list[Path], texts: list[Handed], work: Scoring, place: Place) -> Iterator[Score]:
    """Have workers score files, behind one progress bar."""
    from rich.progress import BarColumn, TimeRemainingColumn

    from rwkv_cli.engine.cluster import connected
    from rwkv_cli.engine.spread import spread

    if not files:
        return
    names = dict(zip(texts, files, strict=True))
    text = "{task.completed:.0f} of {task.total:.0f} texts  {task.fields[rate]:.0f} tok/s{task.fields[crew]}"
    began, tokens, done = time.perf_counter(), 0, 0
    with connected(place, work) as cluster, progress_bar(BarColumn(), text, TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=len(files), rate=0.0, crew="")
        for step in spread(texts, cluster, 1, lambda text: str(names[text])):
            for scored in step.results:
                _remark(files[done], scored.carriage_returns, scored.zeros)
                done, tokens = done + 1, tokens + scored.score.tokens
                yield scored.score
            rate = tokens / (time.perf_counter() - began)
            progress.update(task, completed=done + step.waiting, rate=rate, crew=crew_text(step))


def total(scores: list[Score]) -> str:
    """Write the figures of several texts together as a table, each token with the same weight."""
    tokens, size = sum(s.tokens for s in scores), sum(s.bytes for s in scores)
    nll = sum(s.nll * s.tokens for s in scores) / max(tokens, 1)
    rows = [
        ("total", f"{len(scores)} files"),
        ("perplexity", f"{math.exp(min(nll, 700.0)):.4f}"),
        ("NLL", f"{nll:.6f} nats per token"),
        ("bits per byte", f"{nll * tokens / math.log(2) / max(size, 1):.4f}"),
        ("tokens", f"{tokens} ({size} bytes)"),
    ]
    return columns(rows)


def _error(stderr: float, digits: int) -> str:
    """Write a standard error behind its figure. One token alone has none."""
    return "" if math.isnan(stderr) else f" ± {stderr:.{digits}f}"


def report(file: Path, s: Score, compare: str | None) -> str:
    """Write a score as a table."""
    start = "none" if s.start_token is None else s.start_token
    context = "whole file" if s.context is None else f"{s.context} tokens"
    rows = [
        ("file", file),
        ("perplexity", f"{s.ppl:.4f}{_error(s.ppl_stderr, 4)}"),
        ("NLL", f"{s.nll:.6f}{_error(s.nll_stderr, 6)} nats per token"),
        ("bits per byte", f"{s.bits_per_byte:.4f}"),
        ("tokens", f"{s.tokens} ({s.bytes} bytes), context {context}, start token {start}"),
        ("speed", f"{s.tokens_per_second:.1f} tokens per second"),
    ]
    if s.comparison is not None:
        c = s.comparison
        rows += [
            ("against", f"{compare}: perplexity {c.other_ppl:.4f}"),
            ("KL", f"{c.kl_mean:.3e} mean, {c.kl_p999:.3e} at 99.9 %"),
            ("top-1", f"{100 * c.top1_agreement:.3f} % the same"),
            ("NLL difference", f"{c.nll_diff:+.6f}{_error(c.nll_diff_stderr, 6)} nats per token"),
        ]
    return columns(rows)
