"""The command `rwkv eval`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_cli.commands.options import compare_option, make_ready, model_options, open_model, plot_option, whole_option
from rwkv_cli.terminal.output import columns, note, one_line, progress_bar
from rwkv_cli.terminal.plot import plot_recall

if TYPE_CHECKING:
    from collections.abc import Callable

    from rwkv_cli.engine.evaluating import Measure, Part
    from rwkv_cli.engine.tasks import Step, Task

_ITEMS = {"arithmetic": 100, "recall": 16}
"""Items of each part of a task that the program makes, if nothing else is said."""


@click.command("eval")
@click.argument("tasks", nargs=-1, required=True, metavar="TASK...")
@model_options
@compare_option("Give the same items to this model too, and say how far MODEL is from it.")
@whole_option("--limit", help="Items of each part of a task; default: all of a file, 100 of arithmetic, 16 of recall.")
@click.option(
    "--prompt",
    "form",
    metavar="TEXT",
    help="How a question is written, with \\n for a line break. The answer follows after a blank. Default: "
    "Question: {question}\\nAnswer:",
)
@whole_option("--digits", default=3, most=100, help="Digits of the longest numbers of arithmetic.")
@whole_option("--distance", default=65536, help="Tokens of the longest distance of recall.")
@whole_option("--seed", default=0, least=0, help="Another seed makes other items of arithmetic and recall.")
@plot_option("recall by distance, a line for each model")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a part of a task.")
def command(
    *,
    tasks: tuple[str, ...],
    model: str | None,
    threads: int | None,
    device: str,
    compare: str | None,
    limit: int | None,
    form: str | None,
    digits: int,
    distance: int,
    seed: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure what a model can do. TASK is arithmetic, recall, or a JSONL file, whose keys tell its kind:

    \b
    {"text": "…"}                    LAMBADA: the last word is guessed
    {"question": "…", "choices": ["…", "…"], "answer": 0}
                                     the likeliest choice is taken
    {"question": "…", "answer": "…"} the model writes the answer, a line

    LAMBADA is measured as the reference does it, with its file lambada_test.jsonl, from the folder misc of
    github.com/BlinkDL/ChatRWKV. Arithmetic has sums and differences, and recall asks for a word after 1,024 tokens
    of text, and twice as many again. Each figure has its standard error. With --compare, differences are MODEL minus
    OTHER on the same items, and p is how often chance brings as large a one: by McNemar's test for accuracies and
    Student's for the rest. Ctrl-C ends with what is measured so far.

    \b
    rwkv eval lambada_test.jsonl -m int8.safetensors --compare float.safetensors
    rwkv eval recall --limit 10 --distance 2048 --plot recall.svg
    """
    from rwkv_cli.engine.encodings import unescaped
    from rwkv_cli.engine.evaluating import Tally
    from rwkv_cli.engine.likelihood import start_of_text
    from rwkv_cli.engine.tasks import FORM

    form = FORM if form is None else unescaped(form)
    if "{question}" not in form:
        raise click.BadParameter(f"{form!r} lacks {{question}}", param_hint="--prompt")
    if plot is not None and "recall" not in tasks:
        raise click.UsageError("--plot draws recall, which is not among the tasks")
    made = [_task(name, form=form, limit=limit, digits=digits, distance=distance, seed=seed) for name in tasks]
    models = [open_model(path, device, threads) for path in ([model] if compare is None else [model, compare])]
    for each in models:
        make_ready(each, "last", "every")
    parts: list[Part] = []
    stopped = False
    for task in made:
        tally = Tally(task)
        try:
            with _progress(task) as show:
                for step in task.run(models):
                    tally.add(step.answers)
                    show(step)
        except KeyboardInterrupt:
            stopped = True
        parts += tally.parts
        if stopped:
            break
    starts = [start_of_text(each) for each in models]
    if as_json:
        for part in parts:
            facts = {"model": str(models[0].path), **part.as_json(), "start_token": starts[0]}
            click.echo(json.dumps(facts | ({} if compare is None else {"other": str(models[1].path)})))
    else:
        click.echo(report(parts, [str(each.path) for each in models]))
        note(f"Token {' or '.join(map(str, dict.fromkeys(starts)))} starts each text.")
    recall = [part for part in parts if part.task == "recall" and part.answers]
    if plot is not None and recall:
        plot_recall(plot, recall, [each.path for each in models])
    if stopped:
        done, of = sum(len(part.answers) for part in parts), sum(sum(task.parts.values()) for task in made)
        note(f"Stopped: the figures are those of {done} of {of} items.")
        raise click.Abort


def _task(name: str, *, form: str, limit: int | None, digits: int, distance: int, seed: int) -> Task:
    """Make the task that is named."""
    from rwkv_cli.engine.generated import Recall, arithmetic
    from rwkv_cli.engine.tasks import read_task

    if name in _ITEMS:
        items = limit or _ITEMS[name]
        return arithmetic(digits, items, seed) if name == "arithmetic" else Recall(distance, items, seed)
    path = Path(name)
    if not path.exists() and not path.suffix:
        raise click.UsageError(f"{name!r} is no task: give {' or '.join(_ITEMS)}, or a JSONL file")
    return read_task(name, path.read_bytes(), form, limit)


@contextmanager
def _progress(task: Task) -> Iterator[Callable[[Step], None]]:
    """Show a bar with the rate and the time that is left. The function to call takes each step."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    text = "{task.percentage:.0f} %  {task.fields[rate]}"
    parts = TextColumn("{task.description}", markup=False), BarColumn(), text, TimeRemainingColumn()
    with progress_bar(*parts) as progress:
        bar = progress.add_task(one_line(Path(task.name).name), total=1.0, rate="")
        began, tokens = time.perf_counter(), 0

        def show(step: Step) -> None:
            nonlocal tokens
            tokens += step.tokens
            rate = tokens / (time.perf_counter() - began)
            progress.update(bar, completed=step.share, rate=f"{rate:.0f} tok/s")

        yield show


_NAMES = {
    "accuracy": "accuracy",
    "accuracy_sum": "accuracy, by sum",
    "accuracy_mean": "accuracy, by mean a token",
    "nll": "NLL in nats",
    "nll_word": "NLL in nats a word",
}


def report(parts: Sequence[Part], models: Sequence[str]) -> str:
    """Write the figures as a table."""
    compared = ["OTHER", "difference", "p"] if len(models) > 1 else []
    rows: list[Sequence[Any]] = [("task", "", "items", "measure", "MODEL", *compared)]
    for part in parts:
        items = f"{len(part.answers)}" if len(part.answers) == part.of else f"{len(part.answers)} of {part.of}"
        where = Path(part.task).name, part.name, items
        rows += [(*where, *row) for measure in part.measures() for row in _written(measure)]
        if not part.answers:
            rows.append((*where, "not measured"))
    width = max(map(len, rows))
    return columns([[*row, *[""] * (width - len(row))] for row in rows], right=[2])


def _written(measure: Measure) -> Iterator[tuple[str, ...]]:
    """Write a measure as one row, or as two where perplexity follows from it."""
    scale, digits, unit = (100, 2, " %") if measure.name.startswith("accuracy") else (1, 4, "")

    def figure(value: float, stderr: float, sign: str = "") -> str:
        error = "" if math.isnan(stderr) else f" ± {scale * stderr:.{digits}f}"
        return f"{scale * value:{sign}.{digits}f}{error}{unit}"

    a = measure.against
    compared = () if a is None else (figure(a.other, math.nan), figure(a.difference, a.stderr, "+"), _chance(a.p))
    yield _NAMES[measure.name], figure(measure.value, measure.stderr), *compared
    if measure.name == "nll_word":  # its standard error by the delta method
        ppl = math.exp(min(measure.value, 700.0))
        other = () if a is None else (f"{math.exp(min(a.other, 700.0)):.6g}",)
        error = "" if math.isnan(measure.stderr) else f" ± {ppl * measure.stderr:.4g}"
        yield "perplexity a word", f"{ppl:.6g}{error}", *other


def _chance(p: float) -> str:
    """Write a probability."""
    return "" if math.isnan(p) else "< 0.0001" if p < 0.0001 else f"{p:.4f}"
