"""Work of the scheduler as an answer over HTTP: whole or as a stream of events, given up when the client goes away."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Protocol

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from rwkv_cli.engine.work import Work
from rwkv_cli.errors import BusyError, GrammarError
from rwkv_cli.server.errors import ApiError
from rwkv_cli.server.hosting import Host

_QUIET = 15.0
"""Seconds after which a stream without news says that it is alive."""

_STUCK = 60.0
"""Seconds that a client may take nothing of a stream. Then it is given up."""


class News:
    """Tells a coroutine that there is something new. It is made in the loop and called from any thread."""

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def tell(self) -> None:
        """Wake the coroutine."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Wait for something new."""
        await self._event.wait()
        self._event.clear()


class Reply(Protocol):
    """An answer over HTTP in the making."""

    @property
    def works(self) -> Sequence[Work]:
        """The work that it needs."""

    def whole(self) -> dict[str, Any]:
        """Return the whole answer, once all work is done."""

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield what is new since the last call."""


class Running:
    """A response that runs some work, and gives it up when the client goes away."""

    def __init__(self, host: Host, reply: Reply, news: News, stream: bool) -> None:
        """Submit the work. Raises ApiError where there is too much of it."""
        self._host, self._reply, self._news, self._stream = host, reply, news, stream
        try:
            host.scheduler.submit(reply.works)
        except BusyError as error:
            raise ApiError(503 if host.scheduler.closing else 429, str(error)) from None
        except ValueError as error:  # to ask again is of no use
            raise ApiError(400, f"{error}; ask for fewer, or have the operator raise --max-requests") from None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as ASGI has it."""
        gone = asyncio.create_task(_disconnected(receive))
        try:
            if self._stream:
                await self._send_events(send, gone)
            else:
                await self._send_whole(scope, receive, send, gone)
        finally:
            gone.cancel()
            for work in self._reply.works:
                work.cancelled = work.cancelled or not work.done

    async def _changes(self, gone: asyncio.Task[None]) -> AsyncIterator[bool]:
        """Yield whether there is news, until all work is done or the client has gone."""
        while True:
            ended = all(work.done for work in self._reply.works)
            yield True
            if ended:
                return
            news = asyncio.create_task(self._news.wait())
            try:
                while not news.done():
                    await asyncio.wait((news, gone), timeout=_QUIET, return_when=asyncio.FIRST_COMPLETED)
                    if gone.done():
                        return
                    if not news.done():
                        yield False
            finally:
                news.cancel()

    def _error(self) -> ApiError | None:
        """Return what went wrong with the work, if anything has."""
        for work in self._reply.works:
            if isinstance(work.error, GrammarError):
                return ApiError(400, str(work.error))
            if work.error is not None:
                self._host.log(f"an answer failed: {type(work.error).__name__}: {work.error}")
                return ApiError(500, "the answer failed; the server's operator sees why")
            if work.cancelled:
                return ApiError(503, "the server is about to stop")
        return None

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send, gone: asyncio.Task[None]) -> None:
        """Send the whole answer once it is there."""
        async for _ in self._changes(gone):
            pass
        if not gone.done():
            error = self._error()
            response = error.response() if error else JSONResponse(self._reply.whole())
            await response(scope, receive, send)

    async def _send_events(self, send: Send, gone: asyncio.Task[None]) -> None:
        """Send events as they come."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write(text: str, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": text.encode(), "more_body": more}
            async with asyncio.timeout(_STUCK):
                await send(message)

        with contextlib.suppress(TimeoutError):
            async for news in self._changes(gone):
                if not news:
                    await write(": waiting\n\n")
                    continue
                text = "".join(_event(event) for event in self._reply.events())
                if text:
                    await write(text)
            if not gone.done():
                error = self._error()
                await write((_event(error.body()) if error else "") + "data: [DONE]\n\n")
                await write("", more=False)


def _event(value: dict[str, Any]) -> str:
    """Write an event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _disconnected(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
