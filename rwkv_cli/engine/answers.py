"""The answers of a batch as lines of a file."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from rwkv_cli.engine.completion import Completion
from rwkv_cli.engine.jobs import Task
from rwkv_cli.errors import JobError


def answer_line(task: Task, completion: Completion) -> bytes:
    """Write an answer as a line of JSON."""
    result = completion.result
    record = {
        "id": task.job.id,
        "prompt": task.job.prompt,
        "text": result.text,
        "stop": result.stop,
        "seed": completion.sampler.seed,
        "prompt_tokens": result.prompt_tokens,
        "tokens": result.tokens,
        "digest": task.digest,
    }
    return json.dumps(record).encode() + b"\n"


class Answers:
    """The records of a file of answers to these tasks, by their ids."""

    name = "an answer of --batch"

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = {task.job.id: task for task in tasks}

    def read(self, record: Any) -> tuple[str | int, None]:
        """Return the id. Raises JobError where this is not an answer that one of the tasks would get now."""
        key, prompt, digest = record["id"], record["prompt"], record["digest"]
        task = self._tasks.get(key)
        if task is None or task.job.prompt != prompt:
            raise JobError(f"answers another prompt with id {key!r}")
        if digest != task.digest:
            raise JobError(f"id {key!r} was answered by another model or with other settings")
        return key, None

    def beginnings(self) -> Iterator[bytes]:
        """Yield each answer's line up to its text."""
        for task in self._tasks.values():
            record = {"id": task.job.id, "prompt": task.job.prompt, "text": ""}
            yield json.dumps(record).encode().removesuffix(b'"}')
