"""A plain client of a server, which sends requests as they are."""

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


def ask(
    port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Send a request as it is, and return status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **(headers or {})}
    connection.request(method, path, data, {k: v for k, v in given.items() if v})
    response = connection.getresponse()
    out = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    connection.close()
    return out


def chat(port: int, headers: dict[str, str] | None = None, **changes: Any) -> tuple[int, Any]:
    status, _, body = ask(port, "POST", "/v1/chat/completions", {**CHAT, **changes}, headers)
    return status, json.loads(body)


@contextmanager
def stream(port: int, **changes: Any) -> Iterator[socket.socket]:
    """A stream that has begun, as a socket."""
    body = json.dumps({**CHAT, "stream": True, **changes}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.socket() as connection:
        connection.settimeout(100)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        got = b""
        while b'"content":"' not in got.replace(b'"content":""', b""):
            part = connection.recv(1 << 16)
            assert part, got
            got += part
        yield connection


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it has not come true"
        time.sleep(0.01)
