"""rwkv generate --batch: the prompts of a file, several in one forward pass, an answer a line."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from rwkv_cli.commands.options import open_model
from rwkv_cli.terminal.settings import SAMPLING

if TYPE_CHECKING:
    from rwkv_cli.engine.completion import Completion
    from rwkv_cli.engine.model import LanguageModel
    from rwkv_cli.models import State

_OWN = {"batch", "output", "batch_size"}
_SHARED = {"model", "threads", "device", "max_tokens", "stops", "ignore_eos", "state", *SAMPLING}
"""Options of `rwkv generate` that mean the same for a batch."""


def batch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--batch, --output and --batch-size; with --batch, `run` takes the command's place."""

    @functools.wraps(command)
    def either(**given: Any) -> Any:
        ctx = click.get_current_context()
        own = {name: given.pop(name) for name in _OWN}
        together = own["batch"] is not None
        for param in ctx.command.params:
            name = param.name or ""
            if ctx.get_parameter_source(name) is ParameterSource.DEFAULT:
                continue
            if together and name not in _OWN | _SHARED:
                raise click.UsageError(f"{param.get_error_hint(ctx)} does not go with --batch")
            if not together and name in _OWN:
                raise click.UsageError(f"{param.get_error_hint(ctx)} goes with --batch only")
        return run(**own, **{name: given[name] for name in _SHARED}) if together else command(**given)

    options = [
        click.option("--batch", type=click.Path(path_type=Path), metavar="FILE",
                     help="Continue all prompts of FILE (- for standard input), a JSON object a line."),
        click.option("-o", "--output", type=click.Path(path_type=Path), metavar="OUT",
                     help="With --batch: add the answers to OUT; those that it has already are not made again."),
        click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, metavar="N",
                     help="With --batch: how many prompts go through the model together."),
    ]  # fmt: skip
    for option in reversed(options):
        either = option(either)
    return either


@dataclass(frozen=True)
class Job:
    """A prompt of the file, and what its answer depends on beside the model and the sampler's settings."""

    line: int
    id: str | int
    prompt: str
    max_tokens: int
    seed: int | None
    stops: tuple[str, ...]


def run(
    batch: Path, output: Path | None, batch_size: int, model: Path | None, threads: int | None, device: str,
    max_tokens: int, stops: tuple[str, ...], ignore_eos: bool, state: Path | None, seed: int | None,
    **options: Any,
) -> None:  # fmt: skip
    """Answer every prompt of the file `batch` that has no answer in `output` yet."""
    from rwkv_cli.engine.completion import Completion, new_sampler
    from rwkv_cli.engine.sampling import Sampling
    from rwkv_cli.models.tuned import read_tuned_state
    from rwkv_cli.terminal.output import note

    name = "standard input" if str(batch) == "-" else str(batch)
    if "" in stops:
        raise click.BadParameter("an empty text would end at once", param_hint="--stop")
    data = sys.stdin.buffer.read() if str(batch) == "-" else batch.read_bytes()
    if output is not None and output.is_file() and batch.is_file() and output.samefile(batch):
        raise click.ClickException(f"{output}: holds the prompts themselves; give --output another file")
    jobs = read_jobs(name, data, Job(0, 0, "", max_tokens, seed, stops))
    lm = open_model(model, device, threads)
    settings = replace(Sampling(), **{key: value for key, value in options.items() if value is not None})
    start = read_tuned_state(state, lm) if state else lm.new_state()
    common = _digest(lm.digest, lm.quantization, lm.text_tokenizer.kind, _bits(start), asdict(settings), ignore_eos)
    digests = {job.id: _digest(common, job.max_tokens, job.seed, job.stops) for job in jobs}
    encoded = [(job, _encode(lm, name, job)) for job in jobs]

    def begin(job: Job) -> Completion:
        sampler = new_sampler(lm, settings, job.seed)
        return Completion(lm, start, sampler, job.max_tokens, job.stops, ignore_eos)

    hidden = output is None and sys.stdout.isatty()  # where the answers themselves show how far it is
    with _only_writer(output) as file:
        done, end = answered(output, {job.id: job for job in jobs}, digests) if output is not None else (set(), 0)
        todo = [(job, ids) for job, ids in encoded if job.id not in done]
        put = _lines(output, file, end)
        count, tokens, began = len(done), 0, time.perf_counter()
        try:
            with _progress(len(jobs), hidden) as show:
                for ended, running in _answers(lm, todo, batch_size, begin):
                    for job, completion in ended:
                        put(_record(job, completion, digests[job.id]))
                        count, tokens = count + 1, tokens + completion.tokens
                    making = sum(completion.tokens for completion in running)
                    part = sum(completion.tokens / completion.max_tokens for completion in running)
                    show(count, part, (tokens + making) / (time.perf_counter() - began))
        except KeyboardInterrupt:
            rest = "; the same command does the rest" if output else ""
            note(f"{count} of {len(jobs)} prompts are answered{rest}")
            raise click.Abort from None
    seconds = time.perf_counter() - began
    before = f", {len(done)} of them before" if done else ""
    note(f"{count} prompts answered{before}; {tokens} tokens in {seconds:.1f} s")


def _answers(
    lm: LanguageModel, todo: list[tuple[Job, list[int]]], size: int, begin: Callable[[Job], Completion]
) -> Iterator[tuple[list[tuple[Job, Completion]], list[Completion]]]:
    """After each pass, the answers that ended with it and those being made. Where one ends, the next begins."""
    from rwkv_cli.engine.batch import Batch

    together, waiting = Batch(lm), iter(todo)
    jobs: dict[Completion, Job] = {}
    while True:
        for job, ids in itertools.islice(waiting, size - len(jobs)):
            completion = begin(job)
            together.add(completion, ids)
            jobs[completion] = job
        if not jobs:
            return
        ended = [(jobs.pop(completion), completion) for completion in together.step()]
        yield ended, list(jobs)


def read_jobs(name: str, data: bytes, default: Job) -> list[Job]:
    """The prompts in a file's bytes; what a line leaves out is `default`'s.

    Raises ClickException, naming the line, for one that is not as it should be.
    """
    jobs: dict[str | int, Job] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            job = _job(json.loads(line, parse_int=_whole_number), number, default)
        except json.JSONDecodeError as error:
            raise click.ClickException(f"{name} line {number}: not JSON ({error.msg}, column {error.colno})") from None
        except (ValueError, RecursionError) as error:
            raise click.ClickException(f"{name} line {number}: {error}") from None
        if job.id in jobs:
            raise click.ClickException(f"{name} line {number}: its id {job.id!r} is that of line {jobs[job.id].line}")
        jobs[job.id] = job
    if not jobs:
        raise click.ClickException(f"{name}: holds no prompts")
    return list(jobs.values())


def _whole_number(digits: str) -> int:
    """One in JSON. Raises ValueError for one that Python refuses to read."""
    try:
        return int(digits)
    except ValueError:
        raise ValueError(f"a number in it has {len(digits)} digits, which is too long") from None


def _job(value: Any, number: int, default: Job) -> Job:
    """One line. Raises ValueError saying what is wrong with it."""
    if not isinstance(value, dict):
        raise ValueError('not an object like {"prompt": "Once upon a time"}')
    job = Job(
        number,
        value.get("id", number),
        value.get("prompt", ""),
        value.get("max_tokens", default.max_tokens),
        value.get("seed", default.seed),
        value.get("stop", default.stops),
    )
    if isinstance(job.stops, str | list):
        job = replace(job, stops=(job.stops,) if isinstance(job.stops, str) else tuple(job.stops))
    if not isinstance(job.prompt, str) or not job.prompt:
        raise ValueError('its "prompt" must be a text that is not empty')
    if type(job.id) not in (str, int):
        raise ValueError('its "id" must be a text or a whole number')
    if type(job.max_tokens) is not int or job.max_tokens < 1:
        raise ValueError('its "max_tokens" must be a whole number from 1')
    if job.seed is not None and (type(job.seed) is not int or job.seed < 0):
        raise ValueError('its "seed" must be a whole number from 0')
    if not isinstance(job.stops, tuple) or not all(isinstance(stop, str) and stop for stop in job.stops):
        raise ValueError('its "stop" must be a text or a list of texts, none of them empty')
    settings = sorted((SAMPLING.keys() | {"ignore_eos"}) - {"seed"} & value.keys())
    if settings:
        raise ValueError(f'"{settings[0]}" is the same for all prompts: give it as an option')
    return job


def _encode(lm: LanguageModel, name: str, job: Job) -> list[int]:
    from rwkv_cli.errors import TokenizerError

    try:
        ids = lm.text_tokenizer.encode(job.prompt)
    except TokenizerError as error:
        raise click.ClickException(f"{name} line {job.line}: its prompt is not a text: {error}") from None
    if not ids:
        raise click.ClickException(f"{name} line {job.line}: its prompt has no tokens")
    return ids


def _digest(*facts: Any) -> str:
    """A short name for facts that JSON can hold."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _bits(state: State) -> str:
    """A digest of its numbers."""
    return hashlib.sha256(b"".join(array.tobytes() for array in state.arrays().values())).hexdigest()


def _record(job: Job, completion: Completion, digest: str) -> bytes:
    record = {
        "id": job.id,
        "prompt": job.prompt,
        "text": completion.text,
        "stop": completion.stop,
        "seed": completion.sampler.seed,
        "prompt_tokens": completion.prompt_tokens,
        "tokens": completion.tokens,
        "digest": digest,
    }
    return json.dumps(record).encode() + b"\n"


def answered(path: Path, jobs: dict[str | int, Job], digests: dict[str | int, str]) -> tuple[set[str | int], int]:
    """Which prompts the file `path` has answers to, and how many bytes of it are whole lines.

    A last line that was cut short is not counted, if it begins as the answer to one of `jobs` does. Raises
    ClickException where anything else is not an answer that `jobs` would get now.
    """
    done: set[str | int] = set()
    end = 0
    if not path.is_file():
        return done, end
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path} line {number}"
            whole = line.endswith(b"\n")
            try:
                record = json.loads(line)
                key, prompt, digest = record["id"], record["prompt"], record["digest"]
                job = jobs.get(key)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if isinstance(error, json.JSONDecodeError) and not whole and _begins(line, jobs.values()):
                    break
                raise click.ClickException(f"{where}: not an answer of --batch; give --output another file") from None
            if job is None or job.prompt != prompt:
                raise click.ClickException(
                    f"{where}: answers another prompt with id {key!r}; give --output another file"
                )
            if digest != digests[key]:
                raise click.ClickException(
                    f"{where}: id {key!r} was answered by another model or with other settings; "
                    "give --output another file"
                )
            if not whole:
                break
            done.add(key)
            end += len(line)
    return done, end


def _begins(line: bytes, jobs: Iterable[Job]) -> bool:
    """Whether it may be what was written of the answer to one of `jobs`."""
    for job in jobs:
        head = json.dumps({"id": job.id, "prompt": job.prompt, "text": ""}).encode().removesuffix(b'"}')
        if line.startswith(head) or head.startswith(line):
            return True
    return False


@contextmanager
def _only_writer(path: Path | None) -> Iterator[IO[bytes] | None]:
    """The file, to be added to, which no other run may add to meanwhile; None for standard output."""
    if path is None:
        yield None
        return
    with path.open("ab", buffering=0) as file:
        if sys.platform != "win32" and path.is_file():
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise click.ClickException(
                    f"{path}: another run is writing its answers there; wait for its end, or give --output another file"
                ) from None
            except OSError:  # a file system without locks
                pass
        yield file


def _lines(path: Path | None, file: IO[bytes] | None, end: int) -> Callable[[bytes], object]:
    """A function that writes a line at once: to the file after its first `end` bytes, or to standard output."""
    if path is None or file is None:
        stream = sys.stdout  # itself, not what a progress bar puts in its place
        return lambda line: click.echo(line.decode(), nl=False, file=stream)
    if path.is_file():
        file.truncate(end)

    def put(line: bytes) -> None:
        try:
            while line:
                line = line[file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None

    return put


@contextmanager
def _progress(total: int, hidden: bool) -> Iterator[Callable[[int, float, float], None]]:
    """A function that shows how many prompts are answered, what part of more, and tokens per second."""
    if hidden:
        yield lambda *_: None
        return
    from rich.progress import BarColumn, TimeRemainingColumn

    from rwkv_cli.terminal.output import progress_bar

    text = "{task.fields[done]} of {task.total:.0f} prompts  {task.fields[rate]:.0f} tok/s"
    with progress_bar(BarColumn(), text, TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=total, done=0, rate=0.0)
        yield lambda done, part, rate: progress.update(task, completed=done + part, done=done, rate=rate)
