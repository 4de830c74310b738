"""Many prompts from one file. Each line is a job, and each job gets the text that it would get alone."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from rwkv_cli.engine.batch import complete_together
from rwkv_cli.engine.completion import Completion, Request, new_sampler
from rwkv_cli.engine.json_lines import json_lines
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.errors import JobError, TokenizerError
from rwkv_cli.models import State


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """The settings that a line of the file may give. A line without one takes the default."""

    max_tokens: int
    seed: int | None
    stops: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One prompt of the file."""

    line: int
    id: str | int
    prompt: str
    settings: JobSettings


@dataclass(frozen=True)
class Shared:
    """The beginning and the settings that all jobs of a run share."""

    start: State
    sampling: Sampling
    ignore_eos: bool


@dataclass(frozen=True)
class Task:
    """A job that is ready for a model."""

    job: Job
    ids: list[int]
    """The prompt's token ids."""
    digest: str
    """Digest of everything beside the prompt that the answer depends on."""


@dataclass(frozen=True)
class Pass:
    """The answers of a run after one pass through the model."""

    ended: list[tuple[Task, Completion]]
    """The answers that ended with this pass."""
    running: list[Completion]
    """The answers in the making."""


def read_jobs(name: str, data: bytes, default: JobSettings) -> list[Job]:
    """Read the jobs in a file's bytes. Raises JobError, which names the line, for a line that is wrong."""
    jobs: dict[str | int, Job] = {}
    for number, value in json_lines(name, data, JobError):
        try:
            job = _job(value, number, default)
        except ValueError as error:
            raise JobError(f"{name} line {number}: {error}") from None
        if job.id in jobs:
            raise JobError(f"{name} line {number}: its id {job.id!r} is that of line {jobs[job.id].line}")
        jobs[job.id] = job
    if not jobs:
        raise JobError(f"{name}: holds no prompts")
    return list(jobs.values())


def _job(value: Any, number: int, default: JobSettings) -> Job:
    """Read one line. Raises ValueError, which says what is wrong."""
    if not isinstance(value, dict):
        raise ValueError('not an object like {"prompt": "Once upon a time"}')
    id_, prompt = value.get("id", number), value.get("prompt", "")
    max_tokens, seed = value.get("max_tokens", default.max_tokens), value.get("seed", default.seed)
    stops = value.get("stop", list(default.stops))
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(prompt, str) or not prompt:
        raise ValueError('its "prompt" must be a text that is not empty')
    if type(id_) not in (str, int):
        raise ValueError('its "id" must be a text or a whole number')
    if type(max_tokens) is not int or max_tokens < 1:
        raise ValueError('its "max_tokens" must be a whole number from 1')
    if seed is not None and (type(seed) is not int or seed < 0):
        raise ValueError('its "seed" must be a whole number from 0')
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError('its "stop" must be a text or a list of texts, none of them empty')
    common = {field.name for field in fields(Sampling)} | {"ignore_eos"}
    if misplaced := sorted(common & value.keys()):
        raise ValueError(f'"{misplaced[0]}" is the same for all prompts: give it as an option')
    return Job(number, id_, prompt, JobSettings(max_tokens=max_tokens, seed=seed, stops=tuple(stops)))


def prepare(model: LanguageModel, name: str, jobs: list[Job], shared: Shared) -> list[Task]:
    """Make the jobs of the file `name` ready. Raises JobError for a prompt that the tokenizer does not take."""
    sampling = asdict(shared.sampling)
    bits = hashlib.sha256(b"".join(array.tobytes() for array in shared.start.arrays().values())).hexdigest()
    kind = model.text_tokenizer.kind
    common = _digest(model.digest, model.quantization, kind, bits, sampling, shared.ignore_eos)
    tasks = []
    for job in jobs:
        try:
            ids = model.text_tokenizer.encode(job.prompt)
        except TokenizerError as error:
            raise JobError(f"{name} line {job.line}: its prompt is not a text: {error}") from None
        if not ids:
            raise JobError(f"{name} line {job.line}: its prompt has no tokens")
        settings = job.settings
        tasks.append(Task(job, ids, _digest(common, settings.max_tokens, settings.seed, settings.stops)))
    return tasks


def _digest(*facts: Any) -> str:
    """Return a short name for facts that JSON can hold."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def answer(model: LanguageModel, tasks: list[Task], shared: Shared, size: int) -> Iterator[Pass]:
    """Make the answers, up to `size` at a time. Yields after each pass."""
    task_of: dict[Completion, Task] = {}

    def begin() -> Iterator[Completion]:
        """Yield a new completion for each task."""
        for task in tasks:
            settings = task.job.settings
            request = Request(task.ids, settings.max_tokens, settings.stops, shared.ignore_eos)
            completion = Completion(model, shared.start, new_sampler(model, shared.sampling, settings.seed), request)
            task_of[completion] = task
            yield completion

    for ended, running in complete_together(model, begin(), size):
        yield Pass([(task_of.pop(completion), completion) for completion in ended], running)
