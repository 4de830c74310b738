"""Who gets in, what is refused, and what becomes of clients that go away."""

import asyncio
import http.client
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from client import CHAT, ask, chat, stream, until

from rwkv_cli.engine.scheduler import Limits


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"messages": None}, 400, None),
        ({"messages": []}, 400, None),
        ({"messages": [{"role": "pirate", "content": "x"}]}, 400, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, None),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": True}, 400, "temperature"),
        ({"top_p": 1.5}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"n": 1000}, 400, "n"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": 1.5}, 400, "max_tokens"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": 5}, 400, "stop"),
        ({"seed": 1 << 70}, 400, "seed"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"9999": 1}}, 400, None),
        ({"logprobs": 3}, 400, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream_options": 5}, 400, "stream_options"),
        ({"template": "none"}, 400, None),
        ({"style": "none"}, 400, None),
        ({"think": 5}, 400, "think"),
        ({"tools": "hammer"}, 400, None),
        ({"tools": [{"type": "function"}]}, 400, None),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"model": 5}, 400, "model"),
        ({"model": "../../etc/passwd"}, 404, "model"),
    ],
)
def test_what_is_wrong_is_said(served: Any, changes: dict[str, Any], status: int, param: str | None) -> None:
    got, body = chat(served.port, **changes)
    assert got == status, body
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert error["param"] == param
    assert "/tmp" not in json.dumps(body)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", {}, 400),
        ("POST", "/v1/chat/completions", b"[]", {}, 400),
        ("POST", "/v1/chat/completions", b"\xff", {}, 400),
        ("POST", "/v1/chat/completions", b'{"temperature": NaN}', {}, 400),
        ("POST", "/v1/chat/completions", b"[" * 100_000, {}, 400),
        ("POST", "/v1/chat/completions", b"{}", {"Content-Type": "text/plain"}, 415),
        ("POST", "/v1/chat/completions", b"{}", {"Content-Type": ""}, 415),
        ("GET", "/v1/chat/completions", None, {}, 405),
        ("GET", "/v1/nothing", None, {}, 404),
        ("GET", "/etc/passwd", None, {}, 404),
        ("POST", "/v1/completions", {"prompt": []}, {}, 400),
        ("POST", "/v1/completions", {"prompt": [[]]}, {}, 400),
        ("POST", "/v1/completions", {"prompt": [5, "x"]}, {}, 400),
        ("POST", "/v1/completions", {"prompt": [999]}, {}, 400),
        ("POST", "/v1/completions", {"prompt": "x", "best_of": 3}, {}, 400),
        ("POST", "/v1/completions", {"prompt": ["x"] * 200}, {}, 400),
        ("POST", "/v1/embeddings", {"input": [999]}, {}, 400),
        ("POST", "/v1/embeddings", {}, {}, 400),
        ("POST", "/tokenize", {}, {}, 400),
        ("POST", "/detokenize", {"tokens": [-1]}, {}, 400),
        ("POST", "/detokenize", {"tokens": "x"}, {}, 400),
    ],
)
def test_what_is_no_request_is_refused(
    served: Any, method: str, path: str, body: Any, headers: dict[str, str], status: int
) -> None:
    got, _, answer = ask(served.port, method, path, body, headers)
    assert got == status, answer
    assert json.loads(answer)["error"]["message"]


def test_the_page_and_its_files(served: Any) -> None:
    status, headers, page = ask(served.port, "GET", "/", headers={"Content-Type": ""})
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
    types = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    names = set(re.findall(r'(?:href|src)="([^"#]+)"', page.decode()))
    assert {name.rpartition(".")[2] for name in names} == set(types)
    for name in names:
        status, headers, _ = ask(served.port, "GET", f"/{name}")
        assert status == 200
        assert headers["content-type"].startswith(types[name.rpartition(".")[2]])
        assert headers["x-content-type-options"] == "nosniff"
    for path in ("/page/", "/../app.py", "/app.py", "/page.js/../../app.py"):
        assert ask(served.port, "GET", path)[0] == 404


def test_small_endpoints(served: Any) -> None:
    text = "Grüße ✿"
    _, _, body = ask(served.port, "POST", "/tokenize", {"content": text})
    ids = json.loads(body)["tokens"]
    assert bytes(ids) == text.encode()
    _, _, body = ask(served.port, "POST", "/detokenize", {"model": "other", "tokens": ids})
    assert json.loads(body)["content"] == text
    assert json.loads(ask(served.port, "GET", "/health")[2]) == {"status": "ok"}
    chat(served.port)
    status, headers, body = ask(served.port, "GET", "/metrics")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/plain")
    lines = [line for line in body.decode().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"rwkv_[a-z_]+(\{[^}]*\})? [0-9.]+(e[+-][0-9]+)?", line) for line in lines)
    figures = dict(line.rsplit(" ", 1) for line in lines)
    assert float(figures["rwkv_generated_tokens_total"]) >= 4
    assert int(figures['rwkv_answers_total{path="/v1/chat/completions",status="200"}']) >= 1


def test_a_model_that_cannot_be_loaded_is_an_error(start: Any, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"nothing")
    served = start(models={"bad": tmp_path / "bad"})
    status, body = chat(served.port, model="bad")
    assert status == 500
    assert str(tmp_path) not in json.dumps(body)
    assert str(tmp_path) in served.said[0]


def test_a_key_is_demanded(start: Any) -> None:
    served = start(api_key="open sesame")
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic open sesame"}):
        status, body = chat(served.port, headers)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert ask(served.port, "GET", "/metrics", headers=headers)[0] == 401
    assert ask(served.port, "GET", "/health")[0] == 200
    right = {"Authorization": "Bearer open sesame", "Host": "any.example"}
    assert chat(served.port, right)[0] == 200


def test_pages_of_others_are_kept_out(start: Any, served: Any) -> None:
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "", "[::"):
        status, body = chat(served.port, {"Host": host} if host else {"Host": "\t"})
        assert status == 403, host
        assert "--allow-host" in body["error"]["message"]
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"):
        assert chat(served.port, {"Host": host})[0] == 200
    site = {"Origin": "https://site.example"}
    status, body = chat(served.port, site)
    assert (status, body["error"]["type"]) == (403, "permission_error")
    assert "access-control-allow-origin" not in ask(served.port, "OPTIONS", "/v1/models", headers=site)[1]
    own = f"127.0.0.1:{served.port}"
    assert chat(served.port, {"Origin": f"http://{own}", "Host": own})[0] == 200
    friendly = start(origins=frozenset(["https://site.example"]), hosts=frozenset(["box.example"]))
    assert chat(friendly.port, {"Host": "box.example"})[0] == 200
    status, headers, _ = ask(
        friendly.port, "OPTIONS", "/v1/chat/completions", headers={**site, "Access-Control-Request-Headers": "x-a"}
    )
    assert (status, headers["access-control-allow-headers"]) == (204, "x-a")
    status, headers, _ = ask(friendly.port, "POST", "/v1/chat/completions", CHAT, site)
    assert (status, headers["access-control-allow-origin"]) == (200, "https://site.example")
    assert chat(friendly.port, {"Origin": "https://evil.example"})[0] == 403


def test_too_much_is_refused(start: Any) -> None:
    served = start(Limits(running=1, waiting=2), body_bytes=1000, max_tokens=100_000)
    status, body = chat(served.port, user="x" * 2000)
    assert (status, body["error"]["type"]) == (413, "invalid_request_error")
    chunks = iter([b" " * 600, b" " * 600])
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=100)
    connection.request("POST", "/v1/completions", chunks, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    status, body = chat(served.port, n=3)
    assert (status, "3 answers at once, and 2 is the most" in body["error"]["message"]) == (400, True)
    with stream(served.port, max_tokens=100_000, n=2, stop=["\0\0"], template="g1"):
        status, headers, body = ask(served.port, "POST", "/v1/chat/completions", CHAT)
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(body)["error"]["type"] == "rate_limit_error"
    until(lambda: not served.host.scheduler.running)
    assert chat(served.port)[0] == 200


def test_answers_are_as_long_as_the_server_allows(start: Any) -> None:
    served = start(max_tokens=7)
    status, body = chat(served.port, max_tokens=1000, temperature=0, logit_bias={"65": 100})
    assert (status, body["choices"][0]["message"]["content"]) == (200, "A" * 7)
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("streams", [True, False])
def test_who_goes_away_is_given_up(served: Any, streams: bool) -> None:
    scheduler = served.host.scheduler
    before = scheduler.counts.cancelled
    endless = {"max_tokens": 4000, "logit_bias": {"65": 100}}
    if streams:
        with stream(served.port, **endless):
            assert scheduler.running == 1
    else:
        body = json.dumps({**CHAT, **endless}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        until(lambda: bool(scheduler.running))
        connection.close()
    until(lambda: scheduler.counts.cancelled == before + 1, 2)
    assert not scheduler.running


def test_a_slow_reader_holds_nobody_up(served: Any) -> None:
    with stream(served.port, max_tokens=200, logit_bias={"65": 100}, logprobs=True, top_logprobs=20):
        until(lambda: not served.host.scheduler.running)  # all is made, though nobody has read it
        assert chat(served.port)[0] == 200


def test_a_stuck_client_is_given_up(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_cli.server.running._STUCK", 0.2)
    monkeypatch.setattr("rwkv_cli.server.running._QUIET", 0.05)
    with stream(served.port, max_tokens=200, logit_bias={"65": 100}, logprobs=True, top_logprobs=20) as connection:
        until(lambda: not served.host.scheduler.running)
        time.sleep(0.5)
        got = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        assert b"[DONE]" not in got


def test_many_clients_at_once_lose_nothing(served: Any) -> None:
    """A mix of streams, whole answers and clients that leave. Each gets what it would get alone."""
    want = {
        seed: chat(served.port, seed=seed, max_tokens=12)[1]["choices"][0]["message"]["content"] for seed in range(4)
    }

    async def one(number: int) -> str:
        body = json.dumps({**CHAT, "seed": number % 4, "max_tokens": 12}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        writer.write(body)
        if number % 5 == 4:
            writer.close()
            return ""
        answer = await reader.read()
        writer.close()
        return str(json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"])

    async def everyone() -> list[str]:
        return await asyncio.gather(*map(one, range(40)))

    for number, text in enumerate(asyncio.run(everyone())):
        assert number % 5 == 4 or text == want[number % 4]
    until(lambda: not served.host.scheduler.running + served.host.scheduler.waiting)
