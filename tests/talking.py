"""Chats as tests have them: messages as JSON, turns, and what was said."""

import json
from typing import Any

from rwkv_cli.engine.conversation import Conversation, Reply
from rwkv_cli.engine.forms import Template
from rwkv_cli.engine.messages import read_chat
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.engine.templates import TEMPLATES


def written(template: Template, think: str, messages: list[Any], tools: Any = None) -> str:
    """Write messages and tools that come as JSON."""
    chat = read_chat(json.dumps({"messages": messages, "tools": tools}).encode(), "chat.json")
    return template.for_chat(chat).whole(chat, think)


def talk(model: Any, template: Template, settings: Sampling, n: int, *turns: str) -> tuple[Conversation, str]:
    """A conversation after these turns, and all that was said in it."""
    conversation = Conversation(model, template, settings, 5, n)
    transcript = template.opening
    for turn in turns:
        reply = conversation.reply(turn)
        shown = said(reply)
        assert shown == reply.completion.result.text.lstrip()
        transcript += template.prompt(turn) + reply.completion.result.text + template.end
    return conversation, transcript


def said(reply: Reply) -> str:
    """Make an answer, and return it without its reasoning."""
    return "".join(piece for thinking, piece in reply.stream() if not thinking)


def begun(model: Any, *turns: str) -> Conversation:
    """A conversation after these turns."""
    conversation = Conversation(model, TEMPLATES["plain"], Sampling(top_p=1.0), 5, 9)
    for turn in turns:
        said(conversation.reply(turn))
    return conversation
