"""The body of a request, and its fields with checks."""

import asyncio
import json
import math
from typing import Any

from starlette.requests import Request

from rwkv_cli.server.errors import ApiError

_SECONDS = 30.0
"""Seconds that a client may take to send a body."""


async def read_body(request: Request, most: int) -> "Fields":
    """Read a body of at most so many bytes, which has to be a JSON object. Raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site can send other types without asking
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
    too_large = ApiError(413, f"the body may have {most} bytes at most")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, "the body took too long to arrive") from None
    try:
        value = json.loads(data, parse_constant=_no_constant)
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half a surrogate pair, which is no text") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON ({error!s:.200})") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return Fields(value)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


class Fields:
    """The fields of a JSON object. A field that is null is one that is not there."""

    def __init__(self, values: dict[str, Any], inside: str = "") -> None:
        """`inside` names the field that holds this object, with a dot behind."""
        self._values, self._inside = values, inside

    def get(self, name: str) -> Any:
        """Return a field as it is, or None."""
        return self._values.get(name)

    def wrong(self, name: str, must: str) -> ApiError:
        """Make the error for a field that is not what it must be."""
        return ApiError(400, f"'{self._inside}{name}' must be {must}", self._inside + name)

    def number(self, name: str, low: float, high: float) -> float | None:
        """Return a number of a range."""
        value = self.get(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def whole(self, name: str, low: int, high: int) -> int | None:
        """Return a whole number of a range."""
        value = self.get(name)
        if type(value) is float and value.is_integer():
            value = int(value)
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def flag(self, name: str) -> bool:
        """Return true or false, which is the default."""
        value = self.get(name)
        if value is not None and type(value) is not bool:
            raise self.wrong(name, "true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        """Return a text."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def choice(self, name: str, choices: list[str]) -> str | None:
        """Return one of these texts."""
        value = self.get(name)
        if value is not None and value not in choices:
            raise self.wrong(name, f"one of {', '.join(choices)}")
        return value if value is None else str(value)

    def texts(self, name: str, most: int) -> list[str]:
        """Return a text, or up to so many, as a list. None of them is empty."""
        value = self.get(name)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if len(values) > most or not all(isinstance(text, str) and text for text in values):
            raise self.wrong(name, f"a text or up to {most} of them, none empty")
        return values

    def object(self, name: str) -> "Fields | None":
        """Return an object's fields."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self._inside}{name}.")
