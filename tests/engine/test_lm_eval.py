"""The adapter for lm-evaluation-harness, run by the harness itself on tasks of this test."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from naive import log_softmax

import rwkv_cli

pytest.importorskip("lm_eval", reason="lm-eval is not installed (rwkv-cli[lm-eval]); test_eval.py covers likelihoods")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
metric_list: [{{metric: {metric}}}]
"""
KINDS = {
    "choose": ("acc", 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: 0\n'),
    "roll": ("byte_perplexity", 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'),
    "write": ("exact_match", 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
                             "generation_kwargs: {until: [e, zz], max_gen_toks: 9}\n"),
}  # fmt: skip
DOCS: dict[str, list[dict[str, Any]]] = {
    "choose": [{"q": q, "c": ["a", "two words", "é!"]} for q in ["Q: 1\nA:", "", "Why? ", "Q: 1\nA:", "x" * 300]],
    "roll": [{"text": "It rained. " * n} for n in (1, 60)],
    "write": [{"q": "word " * n, "a": "?"} for n in (1, 9, 3)],
}


def log_likelihood(model: Any, context: list[int], ending: list[int]) -> tuple[float, bool]:
    """The plain one, in one text behind token 0."""
    logits, _ = model.forward([0, *context, *ending], all_logits=True)
    rows = log_softmax(logits[len(context) : -1].astype(np.float64))
    return float(sum(rows[range(len(ending)), ending])), bool((rows.argmax(1) == ending).all())


def test_the_harness_gets_the_plain_figures(byte_model: Path, tmp_path: Path) -> None:
    for name, (metric, kind) in KINDS.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, folder=tmp_path, metric=metric) + kind)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS[name]))
    command = [sys.executable, "-m", "rwkv_cli.lm_eval", "run", "--model", "rwkv", "--model_args", f"path={byte_model}"]
    command += ["--tasks", ",".join(KINDS), "--include_path", tmp_path, "--output_path", tmp_path, "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=os.environ | offline, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    samples = {}
    for name in KINDS:
        (file,) = tmp_path.rglob(f"samples_{name}_*.jsonl")
        samples[name] = [json.loads(line) for line in file.read_text().splitlines()]
    model = rwkv_cli.load(byte_model)
    for sample in samples["choose"]:
        question = sample["doc"]["q"]
        for choice, (found,) in zip(sample["doc"]["c"], sample["resps"], strict=True):
            before, after = question.rstrip(), question[len(question.rstrip()) :] + " " + choice
            want, greedy = log_likelihood(model, list(before.encode()), list(after.encode()))
            assert (float(found[0]), str(found[1])) == (pytest.approx(want, rel=1e-5), str(greedy))
    for sample in samples["roll"]:
        want, _ = log_likelihood(model, [], list(sample["doc"]["text"].encode()))
        assert float(sample["resps"][0][0]) == pytest.approx(want, rel=1e-5)
    for sample in samples["write"]:
        text, state = b"", None
        ids = [0, *sample["doc"]["q"].encode()]
        while len(text) < 9 and not re.search(rb"e|zz", text):
            logits, state = model.forward(ids, state)
            ids = [int(logits.argmax())]
            text += bytes(ids)
        assert sample["resps"][0][0] == re.split(r"e|zz", text.decode(errors="replace"))[0]


def test_a_wrong_model_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"no model")
    command = [sys.executable, "-m", "rwkv_cli.lm_eval", "run", "--model", "rwkv"]
    command += ["--model_args", f"path={tmp_path / 'model'}", "--tasks", "lambada_openai"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1
    assert re.search(r"Error: .*model: ", done.stderr.splitlines()[-1])
