"""Errors as answers, in OpenAI's form."""

import traceback
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""The `type` of an error by its status. Others are the request's fault below 500, and the server's from there."""


class ApiError(Exception):
    """A request that gets an error in place of an answer."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return the error as JSON says it."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the error as an answer."""
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(self.status)
        return JSONResponse(self.body(), self.status, headers)


async def on_api_error(_: Request, error: Exception) -> Response:
    """Answer with the error."""
    assert isinstance(error, ApiError), "the handler is for these"
    return error.response()


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer what the router refuses: paths that are not there, and methods."""
    assert isinstance(error, HTTPException), "the handler is for these"
    what = f"{request.method} {request.url.path}"
    says = {404: f"there is no {what}", 405: f"{what} is not how this is asked for"}
    return ApiError(error.status_code, says.get(error.status_code, error.detail)).response()


async def on_bug(request: Request, error: Exception) -> Response:
    """Answer what nobody has expected, and tell the operator where it happened."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(where.filename).name} line {where.lineno}"
    request.app.state.host.log(f"{request.url.path} failed: {type(error).__name__}: {error} ({place})")
    return ApiError(500, "the server failed; its operator sees why").response()
