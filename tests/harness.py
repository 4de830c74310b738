"""lm-evaluation-harness run by itself on small tasks, and the plain figures that it should find."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from naive import log_softmax

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
metric_list: [{{metric: {metric}}}]
"""
_KINDS = {
    "choose": ("acc", 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: 0\n'),
    "roll": ("byte_perplexity", 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'),
    "write": ("exact_match", 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
                             "generation_kwargs: {until: [e, zz], max_gen_toks: 9}\n"),
}  # fmt: skip
_DOCS: dict[str, list[dict[str, Any]]] = {
    "choose": [{"q": q, "c": ["a", "two words", "é!"]} for q in ["Q: 1\nA:", "", "Why? ", "Q: 1\nA:", "x" * 300]],
    "roll": [{"text": "It rained. " * n} for n in (1, 60)],
    "write": [{"q": "word " * n, "a": "?"} for n in (1, 9, 3)],
}

Samples = list[dict[str, Any]]
"""What the harness logs of each item of a task: the item is `doc`, and the model's answers are `resps`."""


def run_tasks(folder: Path, tasks: Sequence[str], module: str, *options: object) -> dict[str, Samples]:
    """The samples of tasks that `python -m MODULE run` logs with these options. Its files go into the folder."""
    for name in tasks:
        metric, kind = _KINDS[name]
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name, folder=folder, metric=metric) + kind)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in _DOCS[name]))
    command = [sys.executable, "-m", module, "run", *map(str, options), "--tasks", ",".join(tasks)]
    command += ["--include_path", str(folder), "--output_path", str(folder), "--log_samples"]
    env = os.environ | OFFLINE | {"HF_HOME": str(folder / "home")}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    samples = {}
    for name in tasks:
        (file,) = folder.rglob(f"samples_{name}_*.jsonl")
        samples[name] = [json.loads(line) for line in file.read_text().splitlines()]
    return samples


def log_likelihood(model: Any, context: list[int], ending: list[int]) -> tuple[float, bool]:
    """ln p of the ending after the context, and whether it is what greedy decoding writes; from one forward pass."""
    logits, _ = model.forward([*context, *ending], all_logits=True)
    rows = log_softmax(logits[len(context) - 1 : -1].astype(np.float64))
    return float(sum(rows[range(len(ending)), ending])), bool((rows.argmax(1) == ending).all())


def greedy(model: Any, ids: list[int]) -> str:
    """The text of a model over bytes after these ids, up to a stop text of the task `write`: 9 bytes at most."""
    text, state = b"", None
    while len(text) < 9 and not re.search(rb"e|zz", text):
        logits, state = model.forward(ids, state)
        ids = [int(logits.argmax())]
        text += bytes(ids)
    return re.split(r"e|zz", text.decode(errors="replace"))[0]


def check_choices(model: Any, samples: Samples, start: Sequence[int] = ()) -> None:
    """Hold samples of the task `choose` to the plain figures. These ids stand before each text, token 0 before none."""
    for sample in samples:
        question = sample["doc"]["q"]
        for choice, (found,) in zip(sample["doc"]["c"], sample["resps"], strict=True):
            before, after = question.rstrip(), question[len(question.rstrip()) :] + " " + choice
            want, best = log_likelihood(model, [*start, *before.encode()] or [0], list(after.encode()))
            assert (float(found[0]), str(found[1])) == (pytest.approx(want, rel=1e-5), str(best))
