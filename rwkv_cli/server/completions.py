"""The endpoint /v1/completions."""

import asyncio
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from rwkv_cli.engine.choosing import Score
from rwkv_cli.engine.g1h import fill_in
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.engine.tokenizer import END_OF_TEXT
from rwkv_cli.engine.work import Answer
from rwkv_cli.errors import RwkvError
from rwkv_cli.server.errors import ApiError
from rwkv_cli.server.fields import Fields, read_body
from rwkv_cli.server.grammars import Language, wanted_language
from rwkv_cli.server.hosting import Host, Hosted
from rwkv_cli.server.running import News, Running
from rwkv_cli.server.wanted import MOST_TOP, Asked, Wanted, answers, finish_reason, token_text, usage

_USUAL = 16
"""The most tokens of an answer where a request names no number, as OpenAI has it."""

_PROMPTS = 128
"""The most prompts of a request."""


async def complete(request: Request) -> ASGIApp:
    """Go on with one prompt or several."""
    host: Host = request.app.state.host
    fields = await read_body(request, host.settings.body_bytes)
    wanted = Wanted.read(fields)
    top = fields.whole("logprobs", 0, MOST_TOP)
    echo = fields.flag("echo")
    if (fields.whole("best_of", 1, 1 << 31) or wanted.choices) != wanted.choices:
        raise ApiError(400, "'best_of' is not offered beyond 'n'", "best_of")
    hosted, model = await host.find(fields.text("model"))
    wanted = wanted.filled(hosted.elsewhere)
    most = min(_USUAL if wanted.max_tokens is None else wanted.max_tokens, host.settings.max_tokens)
    sampling = wanted.settings(Sampling().changed(**hosted.elsewhere.sampling))
    news = News()

    def prepare() -> "CompletionReply":
        try:
            found = wanted_language(fields, [])
            language = None if found is None else Language(model, found[0], None, found[1])
            made = []
            for prompt in read_prompts(fields, "prompt", model):
                asked = Asked(
                    prompt=prompt,
                    max_tokens=most,
                    stops=wanted.stops,
                    sampling=sampling,
                    top=top,
                    grammar=language.guide if language else None,
                    scores_prompt=echo and top is not None,
                )
                made += answers(hosted, model, asked, wanted, news.tell)
            return CompletionReply(hosted, made, echo, wanted)
        except RwkvError as error:
            raise ApiError(400, hosted.public(error)) from None

    return Running(host, await asyncio.to_thread(prepare), news, wanted.stream)


def read_prompts(fields: Fields, name: str, model: LanguageModel) -> list[list[int]]:
    """Read texts, or the ids of texts: one or several. Raises ApiError and TokenizerError."""
    value, suffix = fields.get(name), fields.text("suffix")
    several = isinstance(value, list) and not (value and all(type(item) is int for item in value))
    prompts = value if several else [value]
    if not 0 < len(prompts) <= _PROMPTS:
        raise fields.wrong(name, f"one prompt or up to {_PROMPTS}")
    read = []
    for prompt in prompts:
        if isinstance(prompt, str) and suffix:
            read.append([END_OF_TEXT, *model.text_tokenizer.encode(fill_in(prompt, suffix))])
        elif isinstance(prompt, str):
            read.append(model.text_tokenizer.encode(prompt) or [END_OF_TEXT])
        elif isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
            read.append(prompt)
        else:
            raise fields.wrong(name, "a text, a list of token ids, or a list of either")
    return read


class _Choice:
    """One answer of a reply, and how far it was told."""

    def __init__(self, answer: Answer, echo: bool) -> None:
        self.answer = answer
        self._tokenizer = answer.model.text_tokenizer
        self._pieces = self._scores = self._at = 0
        self._echo = echo
        self.told = False

    def new(self) -> tuple[str, dict[str, Any] | None]:
        """Return the new text, and the scores of the new tokens if they are wanted."""
        result, before = self.answer.result, ""
        scores: list[Score | int] = []
        if self._echo and (self.answer.begun or self.answer.done):
            self._echo = False
            before = self._tokenizer.decode(self.answer.request.prompt)
            if self.answer.prompt_scores is not None:
                scores += [self.answer.request.prompt[0], *self.answer.prompt_scores]
        pieces = result.pieces[self._pieces :]
        self._pieces += len(pieces)
        text = before + "".join(pieces)
        if self.answer.sampler.top is None:
            return text, None
        # the end of the text has a score, too: evaluation programs count on one for each token that was sampled
        new = self.answer.sampler.scores[self._scores : result.tokens]
        self._scores += len(new)
        return text, self._told([*scores, *new])

    def _told(self, scores: list[Score | int]) -> dict[str, Any]:
        """Write scores as OpenAI does. A token without one is the first of a prompt."""
        told: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for score in scores:
            first = isinstance(score, int)
            text, _ = token_text(self._tokenizer, score if isinstance(score, int) else score.token)
            told["tokens"].append(text)
            told["token_logprobs"].append(None if isinstance(score, int) else score.logprob)
            top = None
            if not isinstance(score, int):
                top = {token_text(self._tokenizer, token)[0]: logprob for token, logprob in reversed(score.top)}
                top.setdefault(text, score.logprob)
            told["top_logprobs"].append(None if first else top)
            told["text_offset"].append(self._at)
            self._at += len(text)
        return told


class CompletionReply:
    """The reply to prompts (`running.Reply`)."""

    def __init__(self, hosted: Hosted, made: Sequence[Answer], echo: bool, wanted: Wanted) -> None:
        self.works, self._wanted = made, wanted
        self._choices = [_Choice(answer, echo) for answer in made]
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": hosted.name,
        }

    def whole(self) -> dict[str, Any]:
        """Return the whole reply."""
        choices = []
        for index, choice in enumerate(self._choices):
            text, scores = choice.new()
            choices.append(
                {"index": index, "text": text, "logprobs": scores, "finish_reason": finish_reason(choice.answer)}
            )
        return {**self._head, "choices": choices, "usage": usage(self.works)}

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield what is new."""
        usual = {"usage": None} if self._wanted.usage else {}
        for index, choice in enumerate(self._choices):
            if choice.told:
                continue
            choice.told = choice.answer.done
            text, scores = choice.new()
            whole = choice.told and choice.answer.error is None and not choice.answer.cancelled
            if text or whole or (scores and scores["tokens"]):
                reason = finish_reason(choice.answer) if whole else None
                one = {"index": index, "text": text, "logprobs": scores, "finish_reason": reason}
                yield {**self._head, "choices": [one], **usual}
        if self._wanted.usage and all(choice.told for choice in self._choices):
            yield {**self._head, "choices": [], "usage": usage(self.works)}
