"""Chat templates that come with a checkpoint, in Jinja's language as transformers runs it."""

import datetime
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rwkv_cli.engine import g1h
from rwkv_cli.engine.bounds import TooLongError, bounded
from rwkv_cli.engine.forms import Template, ThinkMode
from rwkv_cli.engine.json_tokenizer import JsonTokenizer
from rwkv_cli.engine.messages import Chat, function_of, json_value, normalized
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.engine.tokenizer import END_OF_TEXT, Tokenizer
from rwkv_cli.errors import ConversationError

OWN = "own"
"""The name of a template that came with the checkpoint."""

_END_NAMES = ("<|rwkv_tokenizer_end_of_text|>", "<|endoftext|>")
"""Names of token 0 in templates, beside those that the checkpoint's configuration gives."""

_MOST_BITS = 4096
"""Bits of the largest whole number that a template may compute."""

_MARK = "\ufdd0"
"""A character that no text has."""


@dataclass(frozen=True)
class Rendered(Template):
    """A template in Jinja's language. It writes a whole chat, so the model may read from its beginning again."""

    source: str = ""
    special: Mapping[str, str] = field(default_factory=dict)
    """The texts that the template knows as `bos_token` and `eos_token`."""

    turn_by_turn = False

    @classmethod
    def of(cls, source: str, special: Mapping[str, str], style: str = "") -> "Rendered":
        """Make a template, and find out where its answers end and if it knows reasoning. Raises ConversationError."""
        styled = _knows_styles(source)
        made = cls(OWN, "", (), Sampling(), style=(style or "bot") if styled else "", source=source, special=special)
        chat = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", _MARK), ("user", "b"))]
        written = made.whole(Chat(chat), "off")
        thinks = written != made.whole(Chat(chat), "on")
        return replace(
            made,
            stops=tuple(filter(None, [_stop(written.partition(_MARK)[2].partition("b")[0], special)])),
            modes={"off": ThinkMode(skips=True), **({"on": ThinkMode()} if thinks else {})},
            sampling=g1h.STYLES["bot"].sampling if styled else Sampling(),
            skipped=g1h.STYLES["bot"].skipped if styled else None,
        )

    def mode(self, think: str) -> ThinkMode:
        """Return a think mode. While the modes are not known yet, there are all."""
        return super().mode(think) if self.stops else ThinkMode()

    @property
    def styles(self) -> list[str]:
        """The styles that the template has, where it has G1h's."""
        return list(g1h.STYLES) if _knows_styles(self.source) else []

    def styled(self, style: str) -> Template:
        """Return the template in another style, where it has G1h's. Raises ConversationError."""
        if not _knows_styles(self.source):
            raise ConversationError("the model's own chat template has no styles; --template g1h has")
        if style not in g1h.STYLES:
            raise ConversationError(f"{style} is no style; there are {', '.join(g1h.STYLES)}")
        return Rendered.of(self.source, self.special, style)

    def begin(self, system: str) -> str:  # noqa: ARG002 - the whole is written with each prompt
        """Return nothing, since the system text is written with each prompt."""
        return ""

    def close(self, unread: str) -> str:
        """Return the end of the answer that the model has not read. What follows comes with the next prompt."""
        return unread

    def begun(self, prompt: str, _think: str) -> str:
        """Return the part of the answer that a prompt has begun: reasoning, open or empty."""
        found = re.search(r"<think>?(\s*</think>?)?\s*$", prompt)
        return found[0] if found else ""

    def whole(self, chat: Chat, think: str) -> str:
        """Write a whole chat up to the answer to its last message. Raises ConversationError if that cannot be."""
        self.mode(think)
        messages = [dict(message) for message in chat.messages]
        for message in messages:
            calls = [{**c, "function": {**function_of(c)}} for c in message.get("tool_calls") or ()]
            for call in calls:
                call["function"]["arguments"] = json_value(call["function"].get("arguments", {}))
            if calls:
                message["tool_calls"] = calls
            if _knows_styles(self.source):
                message["content"] = normalized(message["content"], message["role"])
            if message["role"] == "tool":
                message["rwkv_json_content"] = json_value(message["content"])
        try:
            with bounded():
                text: str = _compiled(self.source).render(
                    messages=messages,
                    tools=list(chat.tools) or None,
                    add_generation_prompt=True,
                    enable_thinking=think != "off",
                    rwkv_prompt_template=self.style,
                    rwkv_generation_prompt="fake_think" if think == "off" else "open_think",
                    rwkv_add_bos=True,
                    **{"bos_token": "", "eos_token": "", **self.special},
                )
            return text
        except TooLongError:
            why = "it takes too long"
        except MemoryError:
            why = "it takes too much memory"
        except Exception as error:  # a template may raise anything, though never by a call of its choice
            why = f"{error!s:.200}"
        raise ConversationError(f"the model's own chat template fails ({why}); choose another with --template")

    def encode(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Encode a prompt, where the names of token 0 stand for it."""
        if isinstance(tokenizer, JsonTokenizer):  # such a vocabulary has its special tokens itself
            return tokenizer.encode(text)
        names = sorted({*_END_NAMES, *self.special.values()}, key=len, reverse=True)
        ids: list[int] = []
        for number, part in enumerate(re.split("|".join(re.escape(name) for name in names if name), text)):
            ids += [END_OF_TEXT] if number else []
            ids += tokenizer.encode(part) if part else []
        return ids


def _knows_styles(source: str) -> bool:
    """Return whether a template has G1h's styles."""
    return "rwkv_prompt_template" in source


def _stop(follows: str, special: Mapping[str, str]) -> str:
    """Find the text that ends an answer in what follows one: a special token, or the first line that is not blank."""
    for name in (*special.values(), *_END_NAMES):
        if name and name in follows:
            return follows[: follows.index(name) + len(name)]
    found = re.match(r"\s*\S[^\n]*", follows)
    return found[0].rstrip() if found else follows


@functools.lru_cache(4)
def _compiled(source: str) -> Any:
    """Compile a template in a sandbox, with what transformers offers to templates."""
    from jinja2 import TemplateError, ext, nodes, sandbox

    class Generation(ext.Extension):
        """The tag around an answer, which matters in training only."""

        tags = {"generation"}  # noqa: RUF012 - the library's interface

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    def fail(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, "indent": indent, **options})

    class Environment(sandbox.ImmutableSandboxedEnvironment):
        """A sandbox without numbers that take hours to compute."""

        intercepted_binops = frozenset(sandbox.ImmutableSandboxedEnvironment.default_binop_table)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
                if bits > _MOST_BITS:
                    raise OverflowError("a number is too large")
            return super().call_binop(context, operator, left, right)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def is_g1h(template: Rendered) -> bool:
    """Return whether a template writes what G1h's does, on chats that use all of it."""
    if not _knows_styles(template.source):
        return False
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    said: list[dict[str, Any]] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a \n\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    called = [*said, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "{}"}]
    bos = template.special.get("bos_token", "")
    try:
        return all(
            template.styled(style).whole(chat, think) == bos + own.for_chat(chat).whole(chat, think)
            for chat in (Chat(said), Chat(called, [tool]))
            for style, own in g1h.STYLES.items()
            for think in ("on", "off")
        )
    except ConversationError:
        return False
