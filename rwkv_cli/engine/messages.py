"""Messages of a chat in the form of OpenAI's interface: read from JSON and checked."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rwkv_cli.errors import MessagesError

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Chat:
    """Messages that were checked, and the tools that a model may call. The last message waits for an answer."""

    messages: Sequence[Mapping[str, Any]]
    """Each has `role` and `content`, which is text. An assistant's may have `tool_calls`."""
    tools: Sequence[Mapping[str, Any]] = ()

    @property
    def uses_tools(self) -> bool:
        """True if tools are offered, called or answered."""
        return bool(self.tools) or any(m["role"] == "tool" or m.get("tool_calls") for m in self.messages)


def read_chat(messages: bytes, name: str, tools: tuple[bytes, str] | None = None) -> Chat:
    """Read a chat from JSON: a list of messages, or an object with `messages` and perhaps `tools`.

    `name` is what an error calls it, and `tools` is other JSON and its name. Raises MessagesError.
    """
    found = _parsed(messages, name)
    offered = found.get("tools") or [] if isinstance(found, dict) else []
    found = found.get("messages") if isinstance(found, dict) else found
    tools_name = name
    if tools is not None:
        tools_name = tools[1]
        offered = _parsed(*tools)
    return checked_chat(found, offered, name, tools_name)


def checked_chat(messages: Any, tools: Any, name: str, tools_name: str) -> Chat:
    """Check messages and tools that were read from JSON. Raises MessagesError, which calls them by these names."""
    if not isinstance(messages, list) or not messages:
        raise MessagesError(f'{name}: holds no messages; give a list of {{"role": …, "content": …}}')
    checked = [_message(message, f"{name}: message {number}") for number, message in enumerate(messages, 1)]
    if not isinstance(tools, list) or any(_function(tool) is None for tool in tools):
        raise MessagesError(f'{tools_name}: tools are a list of {{"type": "function", "function": {{"name": …}}}}')
    return Chat(checked, tools)


def normalized(text: str, role: str) -> str:
    """Return a text with plain line breaks and no blanks at the ends of lines; a user's has no blank lines either.

    Source: rwkv-rs/transformers-rwkv, tokenization_rwkv.py, `_normalize_content`.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    text = "\n".join(line.rstrip(" \t") for line in lines).rstrip(" \t\n")
    return re.sub(r"\n{2,}", "\n", text) if role == "user" else text


def json_value(value: Any) -> Any:
    """Return the value that a JSON text stands for, or the text where it is no JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the function of a tool or of a call, which may stand there without its wrapping."""
    inner = tool.get("function")
    return inner if isinstance(inner, dict) else tool


def _parsed(data: bytes, name: str) -> Any:
    """Return the value of a JSON file."""
    try:
        value = json.loads(data)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise MessagesError(f"{name}: holds half a surrogate pair, which is no text; mend it") from None
    except (ValueError, RecursionError) as error:
        raise MessagesError(f"{name}: is no JSON ({error}); give messages as OpenAI's interface takes them") from None


def _message(message: Any, where: str) -> dict[str, Any]:
    """Return a message whose content is text."""
    if not isinstance(message, dict):
        raise MessagesError(f"{where} is no object with role and content")
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in _ROLES:
        raise MessagesError(f"{where} has the role {role!r:.80}; there are {', '.join(_ROLES)}")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or any(_function(call) is None for call in calls):
        raise MessagesError(f'{where} has tool_calls that are no list of {{"function": {{"name": …, "arguments": …}}}}')
    return {**message, "role": role, "content": _text(message.get("content"), where)}


def _text(content: Any, where: str) -> str:
    """Return the text of a message. The texts of several parts are joined by line breaks."""
    if content is None:
        return ""
    parts = content if isinstance(content, list) else [content]
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise MessagesError(f"{where} has content that is no text; only text can be read")
    return "\n".join(texts)


def _function(tool: Any) -> Mapping[str, Any] | None:
    """Return the function of a tool or of a call, or None where it has no name."""
    found = function_of(tool) if isinstance(tool, dict) else {}
    return found if isinstance(found.get("name"), str) else None
