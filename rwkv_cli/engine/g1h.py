"""The chat template of G1h and later models (2026-07 on), in three styles.

Source: rwkv-rs/transformers-rwkv 204974d, its chat template and tokenization_rwkv.py.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rwkv_cli.engine.forms import Template, ThinkMode
from rwkv_cli.engine.messages import Chat, function_of, json_value, normalized
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.errors import ConversationError

_SKIP = ThinkMode("", "<think></think", skips=True)
_MODES = {"on": ThinkMode("", "<think"), "off": _SKIP, "fast": _SKIP}

# Source: rwkv-rs/transformers-rwkv, temp/rwkv_infer.py
_OPEN = Sampling(0.96, 0.76, 32, presence_penalty=1.0, frequency_penalty=0.1, penalty_decay=0.988)
# Source: evaluations of rwkv-rs/helicopter and hf-adapter, which have no penalties
_SKIPPED = Sampling(1.0, 0.28, 32, presence_penalty=0.0, frequency_penalty=0.0)

_HOW_TO_CALL = (
    "To call one of these tools, write exactly this format:",
    "**Tool Call:**",
    "```json",
    '{"name": "tool_name", "arguments": {"key": "value"}}',
    "```",
    "Do not invent tool call IDs or write tool outputs yourself.",
)


@dataclass(frozen=True)
class G1h(Template):
    """One style of the template. A turn of it is the message of a user, `joint`, and the label of an answer."""

    roles: tuple[str, str, str] = ("System", "User", "Assistant")
    """The labels of a system text, of a user's and of the model's."""
    message: str = ""
    """One message, with {role} and {text}."""
    joint: str = "\n"
    """The text between messages."""
    answer: str = ""
    """The label before an answer."""

    @property
    def styles(self) -> list[str]:
        """The styles that the template has."""
        return list(STYLES)

    def styled(self, style: str) -> Template:
        """Return another style. Raises ConversationError where there is none of this name."""
        if style not in STYLES:
            raise ConversationError(f"{style} is no style; there are {', '.join(STYLES)}")
        return STYLES[style]

    def for_chat(self, chat: Chat) -> Template:
        """Return the style that this chat is written in. Tools have one of their own."""
        return STYLES["function_calling"] if chat.uses_tools else self

    def clean(self, text: str, role: str = "user") -> str:
        """Return a text as the models were trained on it."""
        return normalized(text, role)

    def close(self, unread: str) -> str:
        """Write what follows an answer. The line breaks before a stop text are part of what follows."""
        return unread.rstrip(" \t\n") + self.end

    def whole(self, chat: Chat, think: str) -> str:
        """Write a whole chat up to the answer to its last message."""
        written = _with_tools(chat) if self.style == "function_calling" else [self._written(m) for m in chat.messages]
        return self.joint.join([*written, self.answer + self.gap + self.mode(think).start])

    def _written(self, message: Any) -> str:
        """Write one message. One without text has no blank after its label."""
        label = self.roles[("system", "user", "assistant").index(message["role"])]
        text = self.clean(message["content"], message["role"])
        written = self.message.format(role=label, text=text)
        return written if text else written.rstrip(" ")


def _with_tools(chat: Chat) -> list[str]:
    """Write the messages of a chat with tools, a part for each line or block."""
    parts: list[str] = []
    system: list[str] = []
    for message in chat.messages:
        role, text = message["role"], normalized(message["content"], message["role"])
        if role == "system":
            system += [text] if text else []
            continue
        if system or (chat.tools and not parts):
            parts += ["### System", *system, *_described(chat.tools), *(_HOW_TO_CALL if chat.tools else ())]
            system = []
        if role == "user":
            parts += ["### User", text]
        elif role == "assistant":
            parts += ["### Assistant", *([text] if text else [])]
            for call in map(function_of, message.get("tool_calls") or ()):
                arguments = json_value(call.get("arguments", {}))
                parts += ["**Tool Call:**", *_block({"name": call["name"], "arguments": arguments})]
        else:
            parts += ["### Tool Output", *_block(json_value(text))]
    return parts + (["### System", *system, *_described(chat.tools)] if system else [])


def _described(tools: Sequence[Any]) -> list[str]:
    """Write what each tool is for, and its parameters."""
    parts = []
    for tool in map(function_of, tools):
        parts.append(f"### `{tool['name']}`")
        if tool.get("description"):
            parts.append(f"**Description:** {tool['description']}")
        parts += ["**Parameters:**", *_block(tool.get("parameters") or {"type": "object", "properties": {}})]
    return parts


def _block(value: Any) -> list[str]:
    """Write a value as a fenced block of JSON."""
    return ["```json", json.dumps(value, ensure_ascii=False, indent=2), "```"]


def _style(name: str, answer: str, stop: str, **texts: Any) -> G1h:
    """Make a style from its pieces. `answer` is the label of the model's answers."""
    message, joint = texts["message"], texts["joint"]
    after = message.partition("{text}")[2] + joint
    return G1h(
        "g1h",
        message.replace("{role}", "User") + joint + answer,
        (stop,),
        _OPEN,
        system=message.replace("{role}", "System") + joint,
        end=after,
        modes=_MODES,
        style=name,
        skipped=_SKIPPED,
        begins_with_end=True,
        answer=answer,
        **texts,
    )


STYLES = {
    "bot": _style("bot", "Bot✿", "✿", gap="", roles=("System", "User", "Bot"), message="{role}✿{text}✿", joint="\n"),
    "assistant": _style("assistant", "Assistant:", "\nUser:", message="{role}: {text}", joint="\n\n"),
    "function_calling": _style(
        "function_calling", "### Assistant", "\n### User", gap="\n", message="### {role}\n{text}", joint="\n"
    ),
}
"""The three styles. The first is the usual one."""


def fill_in(prefix: str, suffix: str) -> str:
    """Write the prompt for the text between two others (rwkv_lightning, API_servers/router/v1_routes.py)."""
    return f"✿prefix✿✿suffix✿{suffix}✿middle✿{prefix}"
