"""Files with one JSON value a line."""

import json
from collections.abc import Iterator
from typing import Any

from rwkv_cli.engine.encodings import as_utf8
from rwkv_cli.errors import RwkvError, TokenizerError


def json_lines(name: str, data: bytes, error: type[RwkvError]) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line that is not blank.

    Raises `error` with the file's `name` for one that is not JSON.
    """
    try:
        data = as_utf8(data)
    except TokenizerError as wrong:
        raise error(f"{name}: {wrong}") from None
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line, parse_int=_whole_number)
        except json.JSONDecodeError as wrong:
            raise error(f"{name} line {number}: not JSON ({wrong.msg}, column {wrong.colno})") from None
        except (ValueError, RecursionError) as wrong:
            raise error(f"{name} line {number}: {wrong}") from None


def _whole_number(digits: str) -> int:
    """Read a number in JSON. Raises ValueError for a number that Python refuses to read."""
    try:
        return int(digits)
    except ValueError:
        raise ValueError(f"a number in it has {len(digits)} digits, which is too long") from None
