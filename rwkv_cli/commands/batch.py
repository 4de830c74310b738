"""The command `rwkv generate --batch`: the prompts of a file, several in one forward pass, an answer a line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
from click.core import ParameterSource

from rwkv_cli.commands.options import make_ready
from rwkv_cli.commands.texts import read_input
from rwkv_cli.terminal.output import counted, crew_text, note, progress_bar
from rwkv_cli.terminal.settings import SAMPLING

if TYPE_CHECKING:
    from rwkv_cli.engine.cluster import Place
    from rwkv_cli.engine.errands import Answered
    from rwkv_cli.engine.jobs import JobSettings, Shared, Task
    from rwkv_cli.engine.model import LanguageModel
    from rwkv_cli.engine.sampling import Sampling

_OWN = {"batch", "output", "batch_size", "ray", "ray_workers"}
"""The options of `rwkv generate` that go with --batch only."""

_SHARED = {"model", "threads", "device", "max_tokens", "stops", "ignore_eos", "state", *SAMPLING}
"""The options of `rwkv generate` that mean the same with --batch."""


def check_options(ctx: click.Context) -> None:
    """Refuse a given option that does not go with --batch, or that goes with --batch only."""
    together = ctx.params["batch"] is not None
    for param in ctx.command.params:
        name = param.name or ""
        if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        if together and name not in _OWN | _SHARED:
            raise click.UsageError(f"{param.get_error_hint(ctx)} does not go with --batch")
        if not together and name in _OWN:
            raise click.UsageError(f"{param.get_error_hint(ctx)} goes with --batch only")


def answer_file(
    prompts: Path,
    output: Path | None,
    *,
    size: int,
    load: Callable[[], LanguageModel],
    default: JobSettings,
    sampling: Sampling,
    ignore_eos: bool,
    state: Path | None,
    place: Place | None,
) -> None:
    """Answer every prompt of the file `prompts` that has no answer in `output` yet, `size` of them at a time.

    With a place they are answered by the workers there, and come in the order of the file.
    """
    from rwkv_cli.engine.answers import Answers
    from rwkv_cli.engine.jobs import Shared, prepare, read_jobs
    from rwkv_cli.engine.records import open_records
    from rwkv_cli.models.tuned import read_tuned_state

    name = "standard input" if str(prompts) == "-" else str(prompts)
    data = read_input() if str(prompts) == "-" else prompts.read_bytes()
    if output is not None and output.is_file() and prompts.is_file() and output.samefile(prompts):
        raise click.ClickException(f"{output}: holds the prompts themselves; give --output another file")
    jobs = read_jobs(name, data, default)
    model = load()
    shared = Shared(read_tuned_state(state, model) if state else model.new_state(), sampling, ignore_eos)
    tasks = prepare(model, name, jobs, shared)
    stdout = sys.stdout  # a progress bar puts another stream in its place
    hidden = output is None and stdout.isatty()  # the answers themselves show the progress
    with nullcontext() if output is None else open_records(output, Answers(tasks)) as file:
        if place is None:
            make_ready(model, "last")
        answered = {} if file is None else file.found
        todo = [task for task in tasks if task.job.id not in answered]
        before = count = len(answered)
        tokens, began = 0, time.perf_counter()
        news = (
            _answered_here(model, todo, shared, size)
            if place is None
            else _spread(model, todo, shared, size, place=place, name=name)
        )
        try:
            with _progress(len(jobs), hidden) as show:
                for came in news:
                    for one in came.answers:
                        if file is None:
                            click.echo(one.line.decode(), nl=False, file=stdout)
                        else:
                            file.add(one.line)
                        count, tokens = count + 1, tokens + one.tokens
                    show(count, came.part, (tokens + came.making) / (time.perf_counter() - began), came.crew)
        except KeyboardInterrupt:
            rest = "; the same command does the rest" if output else ""
            note(f"{count} of {len(jobs)} prompts are answered{rest}")
            raise click.Abort from None
    seconds = time.perf_counter() - began
    known = f", {before} of them before" if before else ""
    note(f"{counted(count, 'prompt')} answered{known}; {counted(tokens, 'token')} in {seconds:.1f} s")


class _News(NamedTuple):
    """The news of one step."""

    answers: list[Answered]
    part: float
    """Answers in the making, each as a part of a whole one."""
    making: int
    """Tokens of the answers in the making."""
    crew: str = ""
    """A word on workers."""


def _answered_here(model: LanguageModel, todo: list[Task], shared: Shared, size: int) -> Iterator[_News]:
    """Answer prompts with this process."""
    from rwkv_cli.engine.errands import answered
    from rwkv_cli.engine.jobs import answer

    for done in answer(model, todo, shared, size):
        making = [(one.result.tokens, one.request.max_tokens) for one in done.running]
        part = sum(made / most for made, most in making)
        yield _News([answered(*ended) for ended in done.ended], part, sum(made for made, _ in making))


def _spread(
    model: LanguageModel, todo: list[Task], shared: Shared, size: int, *, place: Place, name: str
) -> Iterator[_News]:
    """Have workers answer prompts of the file `name`. Each gets enough for some forward passes of `size` of them."""
    from rwkv_cli.engine.cluster import connected
    from rwkv_cli.engine.errands import Answering
    from rwkv_cli.engine.handed import Handed
    from rwkv_cli.engine.spread import spread

    if not todo:
        return
    work = Answering(Handed.model(model.path), shared, size)
    with connected(place, work) as cluster:
        for step in spread(todo, cluster, 4 * size, lambda task: f"{name} line {task.job.line}"):
            yield _News(step.results, step.waiting, 0, crew_text(step))


@contextmanager
def _progress(total: int, hidden: bool) -> Iterator[Callable[[int, float, float, str], None]]:
    """Show a bar.

    The function to call takes how many prompts are answered, what part of more, tokens a second, and a word on workers.
    """
    if hidden:
        yield lambda *_: None
        return
    from rich.progress import BarColumn, TimeRemainingColumn

    text = "{task.fields[done]} of {task.total:.0f} prompts  {task.fields[rate]:.0f} tok/s{task.fields[crew]}"
    with progress_bar(BarColumn(), text, TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=total, done=0, rate=0.0, crew="")
        yield lambda done, part, rate, crew: progress.update(
            task, completed=done + part, done=done, rate=rate, crew=crew
        )
