"""Servers on loopback, in a thread of the tests' own process."""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from extras import needs

needs("starlette", "dev")

from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.prefixes import Bounds, Prefixes
from rwkv_cli.engine.scheduler import Limits, Scheduler
from rwkv_cli.server.app import bind, make_server
from rwkv_cli.server.hosting import Host, Hosted, Settings


class Served:
    """A server, its address and what its operator was told."""

    def __init__(
        self,
        models: dict[str, Path],
        limits: Limits,
        cache: bool = True,
        usual: Any = None,
        ahead: Any = None,
        **settings: Any,
    ) -> None:
        self.said: list[str] = []
        prefixes = Prefixes(Bounds(memory=1 << 26)) if cache else None
        hosted = {name: Hosted(name, path, LanguageModel.load, **(usual or {})) for name, path in models.items()}
        self.host = Host(
            hosted, Scheduler(limits, prefixes, *([ahead] if ahead else [])), Settings(**settings), self.said.append
        )
        listening = bind("127.0.0.1", 0)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # so that a slow reader is felt soon
        self.port = listening.getsockname()[1]
        self._server = make_server(self.host, 2)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self.host.scheduler.close(0)


@pytest.fixture(scope="session")
def start(byte_model: Path) -> Iterator[Callable[..., Served]]:
    """Start servers of the tiny model over bytes. They end with the tests."""
    made: list[Served] = []

    def new(limits: Limits | None = None, **settings: Any) -> Served:
        models = settings.pop("models", {"tiny": byte_model, "other": byte_model})
        made.append(Served(models, limits or Limits(), **settings))
        return made[-1]

    yield new
    for served in made:
        served.stop()


@pytest.fixture(scope="session")
def served(start: Callable[..., Served]) -> Served:
    """A server for all tests that change nothing about it."""
    return start()
