"""lm-evaluation-harness as a client: its local-completions, which splits texts and scores them over HTTP."""

import json
import math
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

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
metric_list: [{{metric: {metric}}}]
"""
KINDS = {
    "choose": ("acc", 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: 0\n'),
    "write": ("exact_match", 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
                             "generation_kwargs: {until: [e, zz], max_gen_toks: 9}\n"),
}  # fmt: skip
DOCS: dict[str, list[dict[str, Any]]] = {
    "choose": [{"q": q, "c": ["a", "two words", "é!"]} for q in ["Q: 1\nA:", "", "Why? ", "x" * 300]],
    "write": [{"q": "word " * n, "a": "?"} for n in (1, 9, 3)],
}


def log_likelihood(model: Any, context: list[int], ending: list[int]) -> tuple[float, bool]:
    """The plain one. Nothing stands before the context."""
    logits, _ = model.forward([*context, *ending], all_logits=True)
    rows = log_softmax(logits[len(context) - 1 : -1].astype(np.float64))
    return float(sum(rows[range(len(ending)), ending])), bool((rows.argmax(1) == ending).all())


def greedy(model: Any, prompt: bytes) -> str:
    """What follows a prompt up to a stop text, 9 tokens at most."""
    text, state, ids = b"", None, list(prompt)
    while len(text) < 9 and not re.search(rb"e|zz", text):
        logits, state = model.forward(ids, state)
        ids = [int(logits.argmax())]
        text += bytes(ids)
    return re.split(r"e|zz", text.decode(errors="replace"))[0]


def test_the_harness_gets_the_plain_figures(served: Any, byte_model: Path, tmp_path: Path) -> None:
    for package in ("lm_eval", "tenacity", "aiohttp"):
        pytest.importorskip(package, reason=f"{package} is not installed; the test below sends the same requests")
    for name, (metric, kind) in KINDS.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, folder=tmp_path, metric=metric) + kind)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS[name]))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--batch_size", "5"]
    command += ["--model_args", f"model=tiny,base_url={served.url}/v1/completions"]
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
            want, best = log_likelihood(model, list(before.encode()) or [0], list(after.encode()))
            assert (float(found[0]), str(found[1])) == (pytest.approx(want, rel=1e-5), str(best))
    for sample in samples["write"]:
        assert sample["resps"][0][0] == greedy(model, sample["doc"]["q"].encode())


def test_the_harness_requests_are_answered_as_it_reads_them(served: Any, byte_model: Path) -> None:
    """These are the bodies that release 0.4.13 sends, and its way to read the answers."""
    import http.client

    def ask(method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=100)
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200
        found = json.loads(response.read())
        connection.close()
        return found

    model = rwkv_cli.load(byte_model)
    assert ask("GET", "/tokenizer_info")["eos_token"] == "\0"
    assert ask("POST", "/tokenize", {"prompt": "test", "add_special_tokens": False})["tokens"] == list(b"test")
    assert ask("POST", "/detokenize", {"tokens": list(b"test")})["prompt"] == "test"
    body = {"model": "tiny", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    pairs = [(list(b"Once upon"), list(b" a time")), ([0], list(b"The end")), (list(b"x" * 300), list(b"y"))]
    for ends in (False, True):  # a text that ends at once has as many scores
        bias = {"logit_bias": {"0": 100}} if ends else {}
        got = ask("POST", "/v1/completions", {**body, **bias, "prompt": [a + b for a, b in pairs]})
        for (context, ending), choice in zip(pairs, got["choices"], strict=True):
            assert choice["finish_reason"] == ("stop" if ends else "length")
            scores = choice["logprobs"]["token_logprobs"][len(context) : -1]
            top = choice["logprobs"]["top_logprobs"][len(context) : -1]
            want, best = log_likelihood(model, context, ending)
            assert len(scores) == len(ending)
            assert math.isclose(sum(scores), want, rel_tol=1e-5)
            assert all(score == max(t.values()) for score, t in zip(scores, top, strict=True)) == best
    body = {"model": "tiny", "prompt": [list(b"word word "), list(b"word ")], "max_tokens": 9, "temperature": 0}
    got = ask("POST", "/v1/completions", {**body, "stop": ["e", "zz"], "seed": 1234})
    assert [choice["text"] for choice in got["choices"]] == [greedy(model, b"word word "), greedy(model, b"word ")]
