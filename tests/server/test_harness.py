"""lm-evaluation-harness as a client: its local-completions, which splits texts and scores them over HTTP."""

import http.client
import json
import math
from pathlib import Path
from typing import Any

from extras import needs
from harness import check_choices, greedy, log_likelihood, run_tasks

import rwkv_cli


def test_the_harness_gets_the_plain_figures(served: Any, byte_model: Path, tmp_path: Path) -> None:
    for package in ("lm_eval", "tenacity", "aiohttp"):
        needs(package, "dev,lm-eval", "the test below sends the same requests")
    args = ["--model", "local-completions", "--batch_size", 5]
    args += ["--model_args", f"model=tiny,base_url={served.url}/v1/completions"]
    samples = run_tasks(tmp_path, ["choose", "write"], "lm_eval", *args)
    model = rwkv_cli.load(byte_model)
    check_choices(model, samples["choose"])
    for sample in samples["write"]:
        assert sample["resps"][0][0] == greedy(model, list(sample["doc"]["q"].encode()))


def test_the_harness_requests_are_answered_as_it_reads_them(served: Any, byte_model: Path) -> None:
    """These are the bodies that release 0.4.13 sends, and its way to read the answers."""

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
    assert [choice["text"] for choice in got["choices"]] == [greedy(model, ids) for ids in body["prompt"]]
