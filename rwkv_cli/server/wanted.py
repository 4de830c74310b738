"""The fields that requests for texts share: where a text ends, how tokens are chosen, what comes with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rwkv_cli.engine.choosing import Chooser, Grammar
from rwkv_cli.engine.completion import Request, random_seed
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.engine.tokenizer import Tokenizer
from rwkv_cli.engine.work import Answer, OnChange
from rwkv_cli.server.errors import ApiError
from rwkv_cli.server.fields import Fields
from rwkv_cli.server.hosting import Hosted, Usual

_CHOICES = 16
"""The most choices of a request."""

MOST_TOP = 20
"""The most likely tokens that are told with each token."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The common part of a request."""

    sampling: dict[str, float | int | None]
    max_tokens: int | None
    stops: tuple[str, ...]
    seed: int | None
    choices: int
    bias: dict[int, float]
    stream: bool
    usage: bool
    """True if a stream ends with the numbers of tokens."""

    @classmethod
    def read(cls, fields: Fields) -> "Wanted":
        """Read the common part. Raises ApiError."""
        options = fields.object("stream_options")
        max_tokens = fields.whole("max_completion_tokens", 0, 1 << 31)
        if max_tokens is None:
            max_tokens = fields.whole("max_tokens", 0, 1 << 31)
        return cls(
            sampling={
                "temperature": fields.number("temperature", 0, 100),
                "top_p": fields.number("top_p", 0, 1),
                "top_k": fields.whole("top_k", 0, 1 << 31),
                "min_p": fields.number("min_p", 0, 1),
                "presence_penalty": fields.number("presence_penalty", -100, 100),
                "frequency_penalty": fields.number("frequency_penalty", -100, 100),
                "penalty_decay": fields.number("penalty_decay", 0, 1),
            },
            max_tokens=max_tokens,
            stops=tuple(fields.texts("stop", 16)),
            seed=fields.whole("seed", -(1 << 63), (1 << 63) - 1),
            choices=fields.whole("n", 1, _CHOICES) or 1,
            bias=_bias(fields),
            stream=fields.flag("stream"),
            usage=options is not None and options.flag("include_usage"),
        )

    def filled(self, usual: Usual) -> "Wanted":
        """Return this with the operator's values where the request has none. Sampling is left to `settings`."""
        seed = usual.seed if self.seed is None else self.seed
        return replace(self, seed=seed, max_tokens=usual.max_tokens if self.max_tokens is None else self.max_tokens)

    def settings(self, usual: Sampling) -> Sampling:
        """Return the settings, where `usual` fills in. The likeliest tokens are not penalized unasked."""
        if self.sampling["temperature"] == 0:
            usual = usual.changed(presence_penalty=0.0, frequency_penalty=0.0)
        return usual.changed(**self.sampling)


def _bias(fields: Fields) -> dict[int, float]:
    """Read numbers that are added to logits, by token id."""
    given = fields.object("logit_bias")
    if given is None:
        return {}
    found = {}
    for name, value in fields.get("logit_bias").items():
        if not name.isdecimal() or len(name) > 9 or type(value) not in (int, float) or not -100 <= value <= 100:
            raise fields.wrong("logit_bias", "an object of token ids with numbers from -100 to 100")
        found[int(name)] = float(value)
    return found


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One prompt, and how its answers are made."""

    prompt: list[int]
    max_tokens: int
    stops: tuple[str, ...]
    sampling: Sampling
    top: int | None = None
    """How many of the likeliest tokens to tell with each token, None for no scores."""
    grammar: Callable[[], Grammar] | None = None
    scores_prompt: bool = False


def answers(hosted: Hosted, model: LanguageModel, asked: Asked, wanted: Wanted, on_change: OnChange) -> list[Answer]:
    """Make the answers to a prompt, one for each choice. Raises ApiError."""
    vocab = model.config.vocab
    if not all(0 <= token < vocab for token in (*asked.prompt, *wanted.bias)):
        raise ApiError(400, f"a token id is outside the vocabulary, which has {vocab}")
    if not asked.prompt:
        raise ApiError(400, "the prompt is empty")
    made: list[Answer] = []
    seed = random_seed() if wanted.seed is None else wanted.seed
    for choice in range(wanted.choices):
        sampler = Chooser(
            asked.sampling,
            (seed + choice) % (1 << 64),
            hosted.uncounted,
            bias=wanted.bias,
            top=asked.top,
            grammar=None if asked.grammar is None else asked.grammar(),
        )
        request = Request(asked.prompt, asked.max_tokens, asked.stops)
        after = made[0] if made and not asked.scores_prompt else None
        answer = Answer(model, sampler, request, on_change, after)
        if asked.scores_prompt:
            answer.prompt_scores, answer.top = [], asked.top or 0
        made.append(answer)
    return made


def finish_reason(answer: Answer) -> str:
    """Return why an answer ended, in OpenAI's words."""
    return "length" if answer.result.stop == "length" or not answer.request.max_tokens else "stop"


def usage(made: Sequence[Answer]) -> dict[str, Any]:
    """Count the tokens of answers. A prompt counts once, whatever the number of its choices."""
    prompts = {id(answer.request.prompt): answer for answer in reversed(made)}.values()
    prompt, completion = sum(len(a.request.prompt) for a in prompts), sum(a.result.tokens for a in made)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached for answer in prompts)},
    }


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """Return the text of a single token, and its bytes."""
    table: list[bytes] | None = getattr(tokenizer, "table", None)
    text = tokenizer.decode([token])
    return text, text.encode() if table is None else table[token] if token < len(table) else b""
