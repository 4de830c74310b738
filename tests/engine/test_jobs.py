"""Many prompts, answered by the engine alone: what a program gets that has no command line."""

import json
from pathlib import Path

import pytest

import rwkv_cli
from rwkv_cli.engine.answers import Answers, answer_line
from rwkv_cli.engine.completion import Completion, Request, new_sampler
from rwkv_cli.engine.jobs import JobSettings, Shared, Task, answer, prepare, read_jobs
from rwkv_cli.engine.records import open_records
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.errors import JobError

DEFAULT = JobSettings(max_tokens=12, seed=3, stops=())
LINES = b"""{"prompt": "Once"}

{"prompt": "The cat", "id": "b", "max_tokens": 5, "seed": 4}
{"prompt": "x", "stop": "z"}
"""


def ready(path: Path) -> tuple[rwkv_cli.engine.model.LanguageModel, Shared, list[Task]]:
    """Load a model and make the jobs of `LINES` ready for it."""
    model = rwkv_cli.load(path)
    shared = Shared(model.new_state(), Sampling(), ignore_eos=True)
    return model, shared, prepare(model, "lines", read_jobs("lines", LINES, DEFAULT), shared)


def test_a_line_takes_what_it_leaves_out_from_the_defaults() -> None:
    jobs = read_jobs("lines", LINES, DEFAULT)
    assert [(job.line, job.id, job.prompt) for job in jobs] == [(1, 1, "Once"), (3, "b", "The cat"), (4, 4, "x")]
    assert [job.settings for job in jobs] == [
        DEFAULT,
        JobSettings(max_tokens=5, seed=4, stops=()),
        JobSettings(max_tokens=12, seed=3, stops=("z",)),
    ]
    with pytest.raises(JobError, match=r"^lines line 2: its id 1 is that of line 1$"):
        read_jobs("lines", b'{"prompt": "a"}\n{"prompt": "b", "id": 1}', DEFAULT)


@pytest.mark.parametrize("size", [1, 2, 9])
def test_answers_come_with_their_tasks_and_are_those_of_each_alone(byte_model: Path, size: int) -> None:
    model, shared, tasks = ready(byte_model)
    before = model.new_state()
    ended = []
    for done in answer(model, tasks, shared, size):
        ended += done.ended
        assert len(done.running) <= size
        assert all(completion.result.stop == "interrupted" for completion in done.running)
    assert {task.job.id for task, _ in ended} == {1, "b", 4}
    for task, completion in ended:
        settings = task.job.settings
        request = Request(task.ids, settings.max_tokens, settings.stops, ignore_eos=True)
        alone = Completion(model, model.new_state(), new_sampler(model, Sampling(), settings.seed), request)
        assert "".join(alone.stream()) == completion.result.text
        assert alone.result.stop == completion.result.stop
    for name, array in shared.start.arrays().items():
        assert (array == before.arrays()[name]).all()


def test_a_file_of_answers_knows_what_it_has(byte_model: Path, tmp_path: Path) -> None:
    model, shared, tasks = ready(byte_model)
    path = tmp_path / "answers"
    with open_records(path, Answers(tasks)) as file:
        assert set(file.found) == set()
        for done in answer(model, tasks[:2], shared, 2):
            for task, completion in done.ended:
                file.add(answer_line(task, completion))
    whole = path.read_bytes()
    assert {json.loads(line)["id"] for line in whole.splitlines()} == {1, "b"}
    path.write_bytes(whole + b'{"id": 4, "prom')
    with open_records(path, Answers(tasks)) as file:
        assert set(file.found) == {1, "b"}
    assert path.read_bytes() == whole
    with (
        pytest.raises(
            JobError, match=r"answers line \d: answers another prompt with id .*; give --output another file"
        ),
        open_records(path, Answers(tasks[2:])),
    ):
        pass
