"""The file that the answers of a run are added to. A run that was stopped goes on after the whole lines in it."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

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


class AnswerFile:
    """An open file of answers. `answered` has the ids of the jobs that need no new answer."""

    def __init__(self, path: Path, file: IO[bytes], tasks: Iterable[Task]) -> None:
        """Read the answers that are there, and cut off a last line that is not whole.

        Raises JobError where a line is not an answer that one of `tasks` would get now.
        """
        self.path, self._file = path, file
        self.answered: set[str | int] = set()
        if path.is_file():
            file.truncate(self._read({task.job.id: task for task in tasks}))

    def _read(self, tasks: dict[str | int, Task]) -> int:
        """Note which jobs are answered. Returns how many bytes of the file are whole lines.

        A last line that was cut short does not count, if it begins as the answer to one of `tasks` does.
        """
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.path} line {number}"
                whole = line.endswith(b"\n")
                try:
                    record = json.loads(line)
                    key, prompt, digest = record["id"], record["prompt"], record["digest"]
                    task = tasks.get(key)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    if isinstance(error, json.JSONDecodeError) and not whole and _begins(line, tasks.values()):
                        break
                    raise JobError(f"{where}: not an answer of --batch; give --output another file") from None
                if task is None or task.job.prompt != prompt:
                    raise JobError(f"{where}: answers another prompt with id {key!r}; give --output another file")
                if digest != task.digest:
                    raise JobError(
                        f"{where}: id {key!r} was answered by another model or with other settings; "
                        "give --output another file"
                    )
                if not whole:
                    break
                self.answered.add(key)
                end += len(line)
        return end

    def add(self, line: bytes) -> None:
        """Write a line at once."""
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def _begins(line: bytes, tasks: Iterable[Task]) -> bool:
    """Return whether a line may be the beginning of the answer to one of `tasks`."""
    for task in tasks:
        record = {"id": task.job.id, "prompt": task.job.prompt, "text": ""}
        head = json.dumps(record).encode().removesuffix(b'"}')
        if line.startswith(head) or head.startswith(line):
            return True
    return False


@contextmanager
def open_answers(path: Path, tasks: Iterable[Task]) -> Iterator[AnswerFile]:
    """Open a file of answers to be added to. No other run may add to it meanwhile, or JobError is raised."""
    with path.open("ab", buffering=0) as file:
        if sys.platform != "win32" and path.is_file():
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JobError(
                    f"{path}: another run is writing its answers there; wait for its end, or give --output another file"
                ) from None
            except OSError:  # a file system without locks
                pass
        yield AnswerFile(path, file, tasks)
