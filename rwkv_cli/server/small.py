"""The endpoints beside those for texts: models, vectors, tokens, health and metrics."""

import asyncio
import base64
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from rwkv_cli.engine.work import Vector
from rwkv_cli.errors import RwkvError
from rwkv_cli.server.completions import read_prompts
from rwkv_cli.server.errors import ApiError
from rwkv_cli.server.fields import read_body
from rwkv_cli.server.hosting import Host, Hosted
from rwkv_cli.server.running import News, Running


async def list_models(request: Request) -> Response:
    """List the models."""
    host: Host = request.app.state.host
    return JSONResponse({"object": "list", "data": [_told(hosted) for hosted in host.models.values()]})


async def show_model(request: Request) -> Response:
    """Show one model."""
    host: Host = request.app.state.host
    name = request.path_params["name"]
    if name not in host.models:
        raise ApiError(404, f"there is no model {name!r:.100}", "model", "model_not_found")
    return JSONResponse(_told(host.models[name]))


def _told(hosted: Hosted) -> dict[str, Any]:
    """Write a model as OpenAI does."""
    return {"id": hosted.name, "object": "model", "created": hosted.created, "owned_by": "rwkv"}


async def embed(request: Request) -> ASGIApp:
    """Make vectors of texts."""
    host: Host = request.app.state.host
    fields = await read_body(request, host.settings.body_bytes)
    form = fields.choice("encoding_format", ["float", "base64"])
    hosted, model = await host.find(fields.text("model"))
    if (fields.whole("dimensions", 1, 1 << 31) or model.config.width) != model.config.width:
        raise fields.wrong("dimensions", f"{model.config.width}, as many as this model has")
    news = News()

    def prepare() -> "EmbeddingReply":
        try:
            prompts = read_prompts(fields, "input", model)
        except RwkvError as error:
            raise ApiError(400, hosted.public(error)) from None
        if not all(0 <= token < model.config.vocab for prompt in prompts for token in prompt):
            raise ApiError(400, f"a token id is outside the vocabulary, which has {model.config.vocab}", "input")
        return EmbeddingReply(hosted, [Vector(model, prompt, news.tell) for prompt in prompts], form == "base64")

    return Running(host, await asyncio.to_thread(prepare), news, stream=False)


class EmbeddingReply:
    """The reply with vectors (`running.Reply`)."""

    def __init__(self, hosted: Hosted, made: Sequence[Vector], coded: bool) -> None:
        self.works, self._made, self._hosted, self._coded = made, made, hosted, coded

    def whole(self) -> dict[str, Any]:
        """Return the whole reply."""
        data = []
        for index, vector in enumerate(self._made):
            values = vector.values.astype(np.float32)
            written: Any = base64.b64encode(values.astype("<f4").tobytes()).decode() if self._coded else values.tolist()
            data.append({"object": "embedding", "index": index, "embedding": written})
        tokens = sum(len(vector.ids) for vector in self._made)
        counts = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "model": self._hosted.name, "data": data, "usage": counts}

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield nothing: vectors come as a whole."""
        return iter(())


async def tokenizer_info(request: Request) -> Response:
    """Tell the text that ends a text, for programs that have the server split their texts (lm-eval)."""
    host: Host = request.app.state.host
    _, model = await host.find(request.query_params.get("model"))
    tokenizer, end = model.text_tokenizer, None
    for token in model.ends[:1]:
        text = tokenizer.decode([token])
        end = text if text and tokenizer.encode(text) == [token] else None
    return JSONResponse({"eos_token": end, "bos_token": None, "pad_token": None})


async def tokenize(request: Request) -> Response:
    """Turn a text into ids."""
    host: Host = request.app.state.host
    fields = await read_body(request, host.settings.body_bytes)
    hosted, model = await host.find(fields.text("model"))
    text = fields.text("content") if fields.get("prompt") is None else fields.text("prompt")
    if text is None:
        raise fields.wrong("prompt", "a text")
    try:
        ids = await asyncio.to_thread(model.text_tokenizer.encode, text)
    except RwkvError as error:
        raise ApiError(400, hosted.public(error), "prompt") from None
    return JSONResponse({"tokens": ids, "count": len(ids)})


async def detokenize(request: Request) -> Response:
    """Turn ids into a text."""
    host: Host = request.app.state.host
    fields = await read_body(request, host.settings.body_bytes)
    hosted, model = await host.find(fields.text("model"))
    ids = fields.get("tokens")
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < model.config.vocab for token in ids):
        raise fields.wrong("tokens", "a list of token ids of this model")
    try:
        text = await asyncio.to_thread(model.text_tokenizer.decode, ids)
    except RwkvError as error:
        raise ApiError(400, hosted.public(error), "tokens") from None
    return JSONResponse({"prompt": text, "content": text})


async def health(request: Request) -> Response:
    """Say whether the server takes requests."""
    host: Host = request.app.state.host
    closing = host.scheduler.closing
    return JSONResponse({"status": "stopping" if closing else "ok"}, 503 if closing else 200)


async def metrics(request: Request) -> Response:
    """Write the server's counts in Prometheus' text form."""
    host: Host = request.app.state.host
    scheduler, counts = host.scheduler, host.scheduler.counts
    kept = scheduler.prefixes
    figures = [
        ("prompt_tokens_total", "counter", "Prompt tokens that were read.", counts.prompt_tokens),
        ("cached_tokens_total", "counter", "Prompt tokens that were known and not read.", counts.cached_tokens),
        ("generated_tokens_total", "counter", "Tokens of answers.", counts.tokens),
        ("passes_total", "counter", "Passes through a model that answers shared.", counts.passes),
        ("busy_seconds_total", "counter", "Time that the models ran.", counts.seconds),
        ("drafted_tokens_total", "counter", "Guesses at tokens that passes have read.", counts.drafted),
        ("accepted_tokens_total", "counter", "Guesses at tokens that were right.", counts.accepted),
        ("cancelled_total", "counter", "Answers whose client went away.", counts.cancelled),
        ("running", "gauge", "Answers in the making.", scheduler.running),
        ("waiting", "gauge", "Answers that wait for their beginning.", scheduler.waiting),
        ("models_loaded", "gauge", "Models in memory.", sum(hosted.loaded for hosted in host.models.values())),
        ("states", "gauge", "Known states, in memory and on disk.", len(kept) if kept is not None else 0),
        ("states_bytes", "gauge", "Bytes of known states in memory.", kept.memory if kept is not None else 0),
        ("start_time_seconds", "gauge", "When the server began, in seconds since 1970.", host.started),
    ]
    lines = []
    for name, kind, says, value in figures:
        lines += [f"# HELP rwkv_{name} {says}", f"# TYPE rwkv_{name} {kind}", f"rwkv_{name} {value:.17g}"]
    lines += ["# HELP rwkv_answers_total Answers over HTTP.", "# TYPE rwkv_answers_total counter"]
    for (path, status), count in sorted(host.answered.items()):
        lines.append(f'rwkv_answers_total{{path="{path}",status="{status}"}} {count}')
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")
