"""The door of the server: who may ask, from which page, and by which name."""

import ipaddress
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rwkv_cli.server.errors import ApiError
from rwkv_cli.server.hosting import Host

_GUARDED = ("/v1/", "/tokenize", "/tokenizer_info", "/detokenize", "/metrics")
"""Beginnings of the paths that need the key. The page and /health do not."""


_COUNTED = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/tokenize", "/detokenize")
"""Paths whose answers are counted one by one."""


class Guard:
    """A layer around the application."""

    def __init__(self, app: ASGIApp, host: Host) -> None:
        self._app, self._host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        origin = headers.get("origin")
        allowed = origin in self._host.settings.origins

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._host.answered[path if path in _COUNTED else "other", message["status"]] += 1
                out = MutableHeaders(scope=message)
                out["X-Content-Type-Options"] = "nosniff"
                if origin is not None and allowed:
                    out["Access-Control-Allow-Origin"] = origin
                    out.add_vary_header("Origin")
            await send(message)

        response: ASGIApp
        if (error := self._refusal(headers, path, scope["method"])) is not None:
            response = error.response()
        elif scope["method"] == "OPTIONS" and allowed:
            response = Response(
                status_code=204,
                headers={
                    "Access-Control-Allow-Methods": "GET, POST",
                    "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "content-type"),
                    "Access-Control-Max-Age": "600",
                },
            )
        else:
            response = self._app
        await response(scope, receive, answer)

    def _refusal(self, headers: Headers, path: str, method: str) -> ApiError | None:
        """Return why a request is refused, or None."""
        settings = self._host.settings
        if settings.api_key is None and not _is_ours(headers.get("host", ""), settings.hosts):
            return ApiError(403, "this name is not one of the server's; its operator can add it with --allow-host")
        origin = headers.get("origin")
        if origin is not None and origin not in settings.origins and urlsplit(origin).netloc != headers.get("host"):
            return ApiError(403, "pages of this site may not use the server; its operator can add it with --cors")
        if settings.api_key is None or not path.startswith(_GUARDED) or (method == "OPTIONS" and origin is not None):
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and secrets.compare_digest(key.strip().encode(), settings.api_key.encode()):
            return None
        return ApiError(401, "give the server's key as Authorization: Bearer KEY", code="invalid_api_key")


def _is_ours(host: str, names: frozenset[str]) -> bool:
    """Return whether a Host header cannot come from a name that a stranger has pointed at this machine."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if name == "localhost" or name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
