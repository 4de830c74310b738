"""The application: every endpoint behind the door, and the server that runs it."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp

from rwkv_cli.server import pages, small
from rwkv_cli.server.chat import answer_chat
from rwkv_cli.server.completions import complete
from rwkv_cli.server.errors import ApiError, on_api_error, on_bug, on_http_error
from rwkv_cli.server.guard import Guard
from rwkv_cli.server.hosting import Host


def application(host: Host) -> ASGIApp:
    """Make the application of a server."""
    routes = [
        Route("/v1/models", small.list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", small.show_model, methods=["GET"]),
        Route("/v1/chat/completions", answer_chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/embeddings", small.embed, methods=["POST"]),
        Route("/tokenizer_info", small.tokenizer_info, methods=["GET"]),
        Route("/tokenize", small.tokenize, methods=["POST"]),
        Route("/detokenize", small.detokenize, methods=["POST"]),
        Route("/health", small.health, methods=["GET"]),
        Route("/metrics", small.metrics, methods=["GET"]),
        *pages.routes(),
    ]
    app = Starlette(routes=routes)
    app.state.host = host
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)
    return Guard(app, host)


def bind(address: str, port: int) -> socket.socket:
    """Listen at an address. Raises OSError, which names it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=512)
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; choose another with --host or --port", f"{address}:{port}"
        ) from None


class _Server(uvicorn.Server):
    """A server that ends at once on Ctrl-C, and on SIGTERM when what it has begun is done."""

    on_start: Callable[[], object] = staticmethod(lambda: None)
    """A function that is called once requests are answered and signals are heard."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.force_exit = self.force_exit or sig == signal.SIGINT


def make_server(host: Host, grace: int) -> _Server:
    """Make the server of a host. After SIGTERM, what was begun has `grace` seconds to end."""
    return _Server(
        uvicorn.Config(
            application(host),
            log_config=None,
            log_level="critical",  # `on_bug` says what goes wrong
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=grace,
            ws="none",
            http="h11",
        )
    )


def serve(host: Host, listening: socket.socket, grace: int, on_start: Callable[[], object]) -> None:
    """Answer requests until a signal comes. `on_start` is called when a signal ends this in good order."""
    server = make_server(host, grace)
    server.on_start = on_start
    with _signals_once():
        server.run(sockets=[listening])
    host.scheduler.close(0)


@contextlib.contextmanager
def _signals_once() -> Iterator[None]:
    """Have nothing happen where the library repeats a signal that has ended it."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
