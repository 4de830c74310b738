"""The endpoint /v1/chat/completions."""

import asyncio
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from rwkv_cli.engine.choosing import Score
from rwkv_cli.engine.forms import Template
from rwkv_cli.engine.messages import Chat, checked_chat, function_of
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.templates import Splitter
from rwkv_cli.engine.tokenizer import Tokenizer
from rwkv_cli.engine.work import Answer
from rwkv_cli.errors import RwkvError
from rwkv_cli.server.errors import ApiError
from rwkv_cli.server.fields import Fields, read_body
from rwkv_cli.server.grammars import Language, wanted_language
from rwkv_cli.server.hosting import Host, Hosted
from rwkv_cli.server.running import News, Running
from rwkv_cli.server.tools import Calls
from rwkv_cli.server.wanted import MOST_TOP, Asked, Wanted, answers, finish_reason, token_text, usage

_USUAL, _REASONING = 1024, 4096
"""The most tokens of an answer where a request names no number."""

_EFFORTS = {"none": ("off",), "minimal": ("off",), "low": ("short", "on"), "medium": ("on",),
            "high": ("long", "on"), "xhigh": ("long", "on")}  # fmt: skip
"""The think modes for OpenAI's efforts, the best first."""


async def answer_chat(request: Request) -> ASGIApp:
    """Answer the last message of a chat."""
    host: Host = request.app.state.host
    fields = await read_body(request, host.settings.body_bytes)
    wanted = Wanted.read(fields)
    top = _top(fields)
    hosted, model = await host.find(fields.text("model"))
    news = News()

    def prepare() -> "ChatReply":
        try:
            return _prepare(host, hosted, model, fields, wanted=wanted, top=top, news=news)
        except RwkvError as error:
            raise ApiError(400, hosted.public(error)) from None

    return Running(host, await asyncio.to_thread(prepare), news, wanted.stream)


def _prepare(
    host: Host, hosted: Hosted, model: LanguageModel, fields: Fields, *, wanted: Wanted, top: int | None, news: News
) -> "ChatReply":
    """Write the prompt, and make the answers to it. Raises ApiError and RwkvError."""
    tools = fields.get("tools") or []
    if fields.get("tool_choice") == "none":
        tools = []
    usual = hosted.in_chats
    wanted = wanted.filled(usual)
    chat = checked_chat(fields.get("messages"), tools, "'messages'", "'tools'")
    if usual.system and not any(message["role"] == "system" for message in chat.messages):
        chat = replace(chat, messages=[{"role": "system", "content": usual.system}, *chat.messages])
    name, style = fields.text("template"), fields.text("style")
    template = model.template.template(name or usual.template, style or (None if name else usual.style)).for_chat(chat)
    found = wanted_language(fields, [function_of(tool)["name"] for tool in chat.tools])
    think = _think(fields, template, found is not None, usual.think)
    text = template.whole(chat, think)
    begun = template.begun(text, think)
    language = None if found is None else Language(model, found[0], begun, found[1])
    most = _REASONING if think in ("on", "short", "long") else _USUAL
    stops = wanted.stops if language else (*template.stops, *_tool_stops(chat), *wanted.stops)
    asked = Asked(
        prompt=[*template.first_ids, *template.encode(model.text_tokenizer, text)],
        max_tokens=min(most if wanted.max_tokens is None else wanted.max_tokens, host.settings.max_tokens),
        stops=stops,
        sampling=wanted.settings(template.sampling_for(think).changed(**usual.sampling)),
        top=top,
        grammar=language.guide if language else None,
    )
    made = answers(hosted, model, asked, wanted, news.tell)
    return ChatReply(hosted, made, begun, wanted, bool(chat.tools))


def _top(fields: Fields) -> int | None:
    """Read how many of the likeliest tokens are told with each token."""
    top = fields.whole("top_logprobs", 0, MOST_TOP)
    if not fields.flag("logprobs"):
        if top is not None:
            raise ApiError(400, "'top_logprobs' needs 'logprobs' to be true", "top_logprobs")
        return None
    return top or 0


def _think(fields: Fields, template: Template, formed: bool, usual: str | None) -> str:
    """Read how the model reasons. An answer in a form does not unasked. Raises ConversationError for an unknown way.

    `usual` is the operator's choice, which not every template knows.
    """
    think = fields.get("think")
    if type(think) is bool:
        think = "on" if think else "off"
    if think is not None and not isinstance(think, str):
        raise fields.wrong("think", "a think mode, true or false")
    effort = fields.choice("reasoning_effort", list(_EFFORTS))
    if think is None and effort is not None and template.thinks:
        think = next((mode for mode in _EFFORTS[effort] if mode in template.modes), None)
    if think is None and not formed and usual in template.modes:
        think = usual
    think = think or ("off" if formed else template.default_think)
    template.mode(think)
    return think


def _tool_stops(chat: Chat) -> tuple[str, ...]:
    """Return what ends an answer with calls: the model would go on with a tool's output of its own."""
    return ("\n### Tool Output",) if chat.uses_tools else ()


class _Choice:
    """One answer of a reply, and how far it was told."""

    def __init__(self, answer: Answer, begun: str, tools: bool) -> None:
        self.answer = answer
        self._splitter, self._calls = Splitter(), Calls() if tools else None
        self._pieces = self._scores = 0
        self._early = list(self._splitter.push(begun)) if begun else []
        self.called = self.told = False
        """True once calls, and the end of the answer, were told."""

    def deltas(self) -> Iterator[dict[str, Any]]:
        """Yield what is new in the answer."""
        ended = self.answer.done  # it is read first: what comes before the end is there then
        pieces = self.answer.result.pieces[self._pieces :]
        self._pieces += len(pieces)
        found, self._early = [*self._early, *self._splitter.push("".join(pieces))], []
        if ended:
            found += self._splitter.end()
        for thinking, text in found:
            shown = text if thinking or self._calls is None else self._calls.push(text)
            if shown:
                yield {"reasoning_content" if thinking else "content": shown}
        if ended and self._calls is not None:
            rest, calls = self._calls.end()
            self._calls = None
            if rest:
                yield {"content": rest}
            if calls:
                self.called = True
                yield {"tool_calls": [{"index": at, **call} for at, call in enumerate(calls)]}

    def scores(self, tokenizer: Tokenizer) -> dict[str, Any] | None:
        """Return how likely the new tokens were, if that is wanted."""
        if self.answer.sampler.top is None:
            return None
        new = self.answer.sampler.scores[self._scores : len(self.answer.result.ids)]
        self._scores += len(new)
        return {"content": [_told(score, tokenizer) for score in new], "refusal": None}

    def reason(self) -> str:
        """Return why the answer ended."""
        return "tool_calls" if self.called else finish_reason(self.answer)


def _told(score: Score, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write a token's score as OpenAI does."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text, raw = token_text(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    return {**one(score.token, score.logprob), "top_logprobs": [one(*pair) for pair in score.top]}


class ChatReply:
    """The reply to a chat (`running.Reply`)."""

    def __init__(self, hosted: Hosted, made: Sequence[Answer], begun: str, wanted: Wanted, tools: bool) -> None:
        self.works = made
        self._choices = [_Choice(answer, begun, tools) for answer in made]
        self._wanted, self._tokenizer = wanted, made[0].model.text_tokenizer
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if wanted.stream else "chat.completion",
            "created": int(time.time()),
            "model": hosted.name,
        }
        self._begun = False

    def whole(self) -> dict[str, Any]:
        """Return the whole reply."""
        choices = []
        for index, choice in enumerate(self._choices):
            message: dict[str, Any] = {"role": "assistant", "content": None}
            for delta in choice.deltas():
                for name, value in delta.items():
                    message[name] = value if name == "tool_calls" else (message.get(name) or "") + value
            for call in message.get("tool_calls", ()):
                del call["index"]
            if not choice.called:
                message["content"] = message["content"] or ""
            scores = choice.scores(self._tokenizer)
            choices.append({"index": index, "message": message, "logprobs": scores, "finish_reason": choice.reason()})
        return {**self._head, "choices": choices, "usage": usage(self.works)}

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield what is new."""
        if not self._begun:
            self._begun = True
            for index in range(len(self._choices)):
                yield self._event(index, {"role": "assistant", "content": ""})
        for index, choice in enumerate(self._choices):
            if choice.told:
                continue
            ended = choice.answer.done
            deltas, scores = list(choice.deltas()), choice.scores(self._tokenizer)
            if scores is not None and scores["content"]:
                deltas = deltas or [{}]
            for at, delta in enumerate(deltas):
                yield self._event(index, delta, scores if at == 0 else None)
            if ended and choice.answer.error is None and not choice.answer.cancelled:
                yield self._event(index, {}, reason=choice.reason())
            choice.told = ended
        if self._wanted.usage and all(choice.told for choice in self._choices):
            yield {**self._head, "choices": [], "usage": usage(self.works)}

    def _event(
        self, index: int, delta: dict[str, Any], scores: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        """Write an event."""
        choice = {"index": index, "delta": delta, "logprobs": scores, "finish_reason": reason}
        return {**self._head, "choices": [choice], **({"usage": None} if self._wanted.usage else {})}
