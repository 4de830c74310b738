"""Calls of tools in an answer, in the form that models of template g1h write them."""

import json
import re
import secrets
from typing import Any

from rwkv_cli.engine.completion import held_back

MARK = "**Tool Call:**"
FENCE = "```"

_CALL = re.compile(r"\s*```(?:json)?\s*(.*?)\s*(?:```\s*|\Z)", re.DOTALL)
"""The text between two marks."""


class Calls:
    """The split of an answer's text into text and calls. It takes the text in pieces."""

    def __init__(self) -> None:
        self._held = ""
        self._calling = False

    def push(self, piece: str) -> str:
        """Take a piece, and return what is certain to be text."""
        self._held += piece
        if self._calling:
            return ""
        before, mark, after = self._held.partition(MARK)
        if mark:
            self._calling, self._held = True, after
            return before.rstrip()
        keep = held_back(self._held, (MARK,))
        keep += len(self._held[: len(self._held) - keep]) - len(self._held[: len(self._held) - keep].rstrip())
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """Return the rest of the text, and the calls. What only looks like calls is text."""
        if not self._calling:
            return self._held, []
        calls = [_call(part) for part in self._held.split(MARK)]
        if None in calls:
            return MARK + self._held, []
        return "", [call for call in calls if call is not None]


def _call(text: str) -> dict[str, Any] | None:
    """Read one call, None if it is none."""
    found = _CALL.fullmatch(text)
    try:
        value = json.loads(found[1]) if found else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": value["name"], "arguments": written}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
