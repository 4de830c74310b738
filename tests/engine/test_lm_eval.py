"""The adapter for lm-evaluation-harness, run by the harness itself on tasks of this test."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from extras import needs
from harness import OFFLINE, check_choices, greedy, log_likelihood, run_tasks

import rwkv_cli

needs("lm_eval", "dev,lm-eval", "test_eval.py covers likelihoods")


def test_the_harness_gets_the_plain_figures(byte_model: Path, tmp_path: Path) -> None:
    args = ["--model", "rwkv", "--model_args", f"path={byte_model}"]
    samples = run_tasks(tmp_path, ["choose", "roll", "write"], "rwkv_cli.lm_eval", *args)
    model = rwkv_cli.load(byte_model)
    check_choices(model, samples["choose"], start=[0])
    for sample in samples["roll"]:
        want, _ = log_likelihood(model, [0], list(sample["doc"]["text"].encode()))
        assert float(sample["resps"][0][0]) == pytest.approx(want, rel=1e-5)
    for sample in samples["write"]:
        assert sample["resps"][0][0] == greedy(model, [0, *sample["doc"]["q"].encode()])


def test_a_wrong_model_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"no model")
    command = [sys.executable, "-m", "rwkv_cli.lm_eval", "run", "--model", "rwkv"]
    command += ["--model_args", f"path={tmp_path / 'model'}", "--tasks", "lambada_openai"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | OFFLINE)
    assert done.returncode == 1
    assert re.search(r"Error: .*model: ", done.stderr.splitlines()[-1])
