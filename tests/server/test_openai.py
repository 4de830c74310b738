"""Every endpoint, asked by OpenAI's own client."""

import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extras import needs

openai = needs("openai", "dev,reference", "test_door.py and test_harness.py speak with the endpoints without it")

from rwkv_cli.engine.choosing import Chooser
from rwkv_cli.engine.completion import Completion, Request, new_sampler
from rwkv_cli.engine.drafting import DraftModel
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.engine.speculation import Pace, Speculation
from rwkv_cli.engine.templates import TEMPLATES
from rwkv_cli.server.hosting import Usual

HELLO = [{"role": "user", "content": "Hello"}]
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tell the time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["UTC", "CET"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
def client(served: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(byte_model: Path) -> LanguageModel:
    return LanguageModel.load(byte_model)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have the model say a text."""

    def say(text: str) -> None:
        def sample(sampler: Chooser, _: Any) -> int:
            left: list[int] = vars(sampler).setdefault("left", [*text.encode(), 0])
            return left.pop(0)

        monkeypatch.setattr(Chooser, "sample", sample)

    return say


def alone(model: LanguageModel, prompt: str, settings: Sampling, seed: int, n: int, stops: tuple[str, ...] = ()) -> str:
    ids = model.text_tokenizer.encode(prompt)
    completion = Completion(model, model.new_state(), new_sampler(model, settings, seed), Request(ids, n, stops))
    return "".join(completion.stream())


def streamed(events: Any) -> tuple[list[str], list[Any]]:
    """The texts of a stream's choices, and its events."""
    texts, seen = {}, []
    for event in events:
        seen.append(event)
        for choice in event.choices:
            part = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (part or "")
    return [texts[index] for index in sorted(texts)], seen


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").owned_by == "rwkv"
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.models.retrieve("big")
    with pytest.raises(openai.NotFoundError, match="there are tiny, other"):
        client.chat.completions.create(model="big", messages=HELLO)


def test_a_chat_is_answered_as_the_engine_would(client: Any, model: LanguageModel) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "seed": 5, "max_tokens": 30, "n": 2}
    whole = client.chat.completions.create(**ask)
    template = TEMPLATES["plain"]
    prompt = template.prompt("Hello")
    for choice in whole.choices:
        want = alone(model, prompt, template.sampling, 5 + choice.index, 30, template.stops)
        assert choice.message.content == want.lstrip()
        assert choice.finish_reason in ("length", "stop")
    texts, events = streamed(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert texts == [choice.message.content for choice in whole.choices]
    assert [event.choices[0].delta.role for event in events[:2]] == ["assistant", "assistant"]
    reasons = {c.index: c.finish_reason for event in events for c in event.choices if c.finish_reason}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    for counts in (whole.usage, events[-1].usage):
        assert counts.prompt_tokens == len(prompt)
        assert counts.total_tokens == len(prompt) + counts.completion_tokens
    assert events[-1].usage.prompt_tokens_details.cached_tokens == len(prompt)
    assert not events[-1].choices
    assert len({event.id for event in events}) == 1


def test_the_operators_settings_hold_where_a_request_says_nothing(start: Any, model: LanguageModel) -> None:
    usual = Usual(sampling={"temperature": 0.5}, seed=4, max_tokens=20, system="Be brief.", template="g1", think="off")
    served = start(usual={"in_chats": usual, "elsewhere": Usual(sampling={"top_p": 0.5}, seed=8, max_tokens=9)})
    template = TEMPLATES["g1"]
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:

        def chat(messages: list[Any], **asked: Any) -> Any:
            return client.chat.completions.create(model="tiny", messages=messages, **asked)

        def want(system: str, settings: Sampling, seed: int, n: int, template: Any = template) -> str:
            prompt = template.begin(system) + template.prompt("Hello")
            return alone(model, prompt, settings, seed, n, template.stops).lstrip()

        cool = template.sampling.changed(temperature=0.5)
        assert chat(HELLO).choices[0].message.content == want("Be brief.", cool, 4, 20)
        own = [{"role": "system", "content": "Be long."}, *HELLO]
        got = chat(own, temperature=0.9, seed=6, max_tokens=30).choices[0].message.content
        assert got == want("Be long.", cool.changed(temperature=0.9), 6, 30)
        plain = TEMPLATES["plain"]
        got = chat(HELLO, extra_body={"template": "plain"}).choices[0].message.content
        assert got == want("Be brief.", plain.sampling.changed(temperature=0.5), 4, 20, plain)
        assert chat(HELLO, extra_body={"think": "on"}).choices[0].message.content.startswith("<think")
        go_on = client.completions.create(model="tiny", prompt="Once")
        assert go_on.choices[0].text == alone(model, "Once", Sampling(top_p=0.5), 8, 9)
        asked = client.completions.create(model="tiny", prompt="Once", top_p=1, seed=1, max_tokens=5)
        assert asked.choices[0].text == alone(model, "Once", Sampling(top_p=1), 1, 5)


def test_a_completion_takes_every_setting(client: Any, model: LanguageModel) -> None:
    settings = {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.3, "frequency_penalty": -0.1}
    ours: dict[str, Any] = {"top_k": 40, "min_p": 0.01, "penalty_decay": 0.9}
    want = alone(model, "Once upon", Sampling(**settings, **ours), 3, 25)
    ask: dict[str, Any] = {"model": "tiny", "prompt": "Once upon", "seed": 3, "max_tokens": 25, "extra_body": ours}
    got = client.completions.create(**ask, **settings)
    assert got.choices[0].text == want
    assert got.usage.completion_tokens == 25
    stop = want[10:12]
    assert client.completions.create(**ask, **settings, stop=[stop, "zzzz"]).choices[0].text == want.partition(stop)[0]
    texts, _ = streamed(client.completions.create(**ask, **settings, stream=True))
    assert texts == [want]
    biased = client.completions.create(**ask, logit_bias={"65": 100, "66": 100}, temperature=0)
    assert set(biased.choices[0].text) <= {"A", "B"}
    greedy = client.completions.create(model="tiny", prompt="Once", temperature=0, max_tokens=20)
    no_penalties = Sampling(temperature=0, presence_penalty=0, frequency_penalty=0)
    assert greedy.choices[0].text == alone(model, "Once", no_penalties, 0, 20)
    assert len(client.completions.create(model="tiny", prompt="Once").choices[0].text.encode()) >= 1


def test_prompts_are_scored_for_evaluations(client: Any, model: LanguageModel) -> None:
    """As lm-eval asks: ids of several prompts, each scored with one token more."""
    prompts = [list(b"Once upon a time"), list(b"The end")]
    got = client.completions.create(model="tiny", prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0)
    assert [choice.index for choice in got.choices] == [0, 1]
    for prompt, choice in zip(prompts, got.choices, strict=True):
        logits, _ = model.forward(prompt, all_logits=True)
        p = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
        told = choice.logprobs
        assert len(told.tokens) == len(prompt) + 1
        assert told.token_logprobs[0] is None
        want = [p[i, token] for i, token in enumerate(prompt[1:])]
        np.testing.assert_allclose(told.token_logprobs[1:-1], want, rtol=1e-6)
        np.testing.assert_allclose(
            [max(top.values()) for top in told.top_logprobs[1:-1]], p[:-1].max(axis=1), rtol=1e-6
        )
        assert choice.text.startswith(bytes(prompt).decode())
        assert told.text_offset[: len(prompt)] == list(range(len(prompt)))
    only = client.completions.create(model="tiny", prompt="Once upon", echo=True, logprobs=0, max_tokens=0)
    assert only.choices[0].text == "Once upon"
    assert only.choices[0].logprobs.token_logprobs[1:] == pytest.approx(got.choices[0].logprobs.token_logprobs[1:9])
    plain, _ = streamed(client.completions.create(model="tiny", prompt="Once", echo=True, max_tokens=3, stream=True))
    assert plain[0].startswith("Once")


def test_tokens_come_with_how_likely_they_were(client: Any) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "seed": 1, "max_tokens": 8}
    got = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    content = got.choices[0].logprobs.content
    assert len(content) == 8
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert all(a.logprob >= b.logprob for a, b in pairwise(token.top_logprobs))
    events = list(client.chat.completions.create(**ask, logprobs=True, top_logprobs=3, stream=True))
    together = [c for event in events for choice in event.choices if choice.logprobs for c in choice.logprobs.content]
    assert together == content
    with pytest.raises(openai.BadRequestError, match="needs 'logprobs'"):
        client.chat.completions.create(**ask, top_logprobs=3)
    completion = client.completions.create(model="tiny", prompt="Hi", max_tokens=4, logprobs=2, seed=1)
    assert len(completion.choices[0].logprobs.token_logprobs) == 4


def test_reasoning_stands_apart(client: Any, script: Callable[[str], None]) -> None:
    script(">\nHm, a greeting. \n</think>\nHello, you!")
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "extra_body": {"template": "g1"}}
    message = client.chat.completions.create(**ask).choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm, a greeting.", "Hello, you!")
    parts: dict[str, str] = {"reasoning_content": "", "content": ""}
    for event in client.chat.completions.create(**ask, stream=True):
        for name in parts:
            parts[name] += getattr(event.choices[0].delta, name, None) or ""
    assert parts == {"reasoning_content": "Hm, a greeting.", "content": "Hello, you!"}
    script("Hello, you!")
    for off in ({"think": False}, {"think": "off"}, {"reasoning_effort": "none"}):
        ask["extra_body"] = {"template": "g1", **off}
        message = client.chat.completions.create(**ask).choices[0].message
        assert message.content == "Hello, you!"
        assert not hasattr(message, "reasoning_content")
    with pytest.raises(openai.BadRequestError, match="no think mode"):
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"think": "much"})


def test_tools_are_called(client: Any, script: Callable[[str], None]) -> None:
    call = '\n**Tool Call:**\n```json\n{"name": "clock", "arguments": {"zone": "UTC"}}\n```'
    script(f">Let me see.{call}{call}\n### Tool Output\n12:00")
    ask: dict[str, Any] = {
        "model": "tiny",
        "messages": HELLO,
        "tools": [CLOCK],
        "extra_body": {"template": "g1h", "think": False},
    }
    choice = client.chat.completions.create(**ask).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [{"zone": "UTC"}] * 2
    assert len({call.id for call in choice.message.tool_calls}) == 2
    events = list(client.chat.completions.create(**ask, stream=True))
    calls = [c for e in events for c in e.choices[0].delta.tool_calls or []]
    assert [(c.index, c.function.name) for c in calls] == [(0, "clock"), (1, "clock")]
    assert "".join(e.choices[0].delta.content or "" for e in events) == "Let me see."
    assert events[-1].choices[0].finish_reason == "tool_calls"
    script(">**Tool Call:**\nI will not.")
    choice = client.chat.completions.create(**ask).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", "**Tool Call:**\nI will not.")
    answered = [*HELLO, {"role": "assistant", "tool_calls": [calls[0].model_dump(exclude={"index"})]}]
    script(">It is noon.")
    ask["messages"] = [*answered, {"role": "tool", "tool_call_id": calls[0].id, "content": "12:00"}]
    assert client.chat.completions.create(**ask).choices[0].message.content == "It is noon."


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "clock"}}])
def test_a_call_can_be_demanded(client: Any, choice: Any) -> None:
    other = {"type": "function", "function": {"name": "dice"}}
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tool_choice": choice, "extra_body": {"template": "g1h"}}
    tools = [CLOCK] if choice == "required" else [other, CLOCK]
    got = client.chat.completions.create(**ask, tools=tools, seed=2, max_tokens=300).choices[0]
    assert got.finish_reason == "tool_calls"
    (call,) = got.message.tool_calls
    assert call.function.name == "clock"
    assert json.loads(call.function.arguments)["zone"] in ("UTC", "CET")
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        client.chat.completions.create(
            **{**ask, "tool_choice": {"type": "function", "function": {"name": "x"}}}, tools=tools
        )
    with pytest.raises(openai.BadRequestError, match="cannot write tools"):
        client.chat.completions.create(model="tiny", messages=HELLO, tools=tools)


def test_answers_follow_a_schema(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    for seed in range(3):
        ask: dict[str, Any] = {
            "model": "tiny",
            "messages": HELLO,
            "response_format": form,
            "seed": seed,
            "max_tokens": 200,
        }
        got = client.chat.completions.create(**ask).choices[0]
        value = json.loads(got.message.content)
        assert got.finish_reason == "stop"
        assert set(value) == {"name", "age"}
        assert len(value["name"]) <= 6
        assert 0 <= value["age"] <= 99
        scored = client.chat.completions.create(**ask, logprobs=True).choices[0]
        assert scored.message.content == got.message.content, "scores change nothing"
    texts, _ = streamed(client.chat.completions.create(**ask, stream=True))
    assert json.loads(texts[0]) == value
    for template, think in (("g1", "fast"), ("g1h", "off"), ("world", "off")):
        ask["extra_body"] = {"template": template, "think": think}
        assert set(json.loads(client.chat.completions.create(**ask).choices[0].message.content)) == {"name", "age"}
    ask |= {"response_format": {"type": "json_object"}, "max_tokens": 3}
    assert client.chat.completions.create(**ask).choices[0].message.content.startswith("{")


def test_guesses_ahead_follow_a_schema(start: Any, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "best", lambda _: 3)
    served = start(ahead=lambda model: Speculation(model, DraftModel(model, model)))
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as other:
        for extra in ({}, {"logprobs": True}, {"response_format": form}, {"response_format": form, "logprobs": True}):
            ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "seed": 3, "max_tokens": 60, **extra}
            got, want = (to.chat.completions.create(**ask).choices[0] for to in (other, client))
            assert (got.message, got.finish_reason, got.logprobs) == (want.message, want.finish_reason, want.logprobs)
    counts = served.host.scheduler.counts
    assert 60 < counts.accepted <= counts.drafted


@pytest.mark.parametrize("grammar", ['start: "yes" | "no"', 'root ::= "yes" | "no"'])
def test_answers_follow_a_grammar(client: Any, grammar: str) -> None:
    got = client.completions.create(model="tiny", prompt="Is it?", max_tokens=9, extra_body={"grammar": grammar})
    assert got.choices[0].text in ("yes", "no")
    assert got.choices[0].finish_reason == "stop"


def test_a_form_comes_after_reasoning(model: LanguageModel) -> None:
    from rwkv_cli.server.grammars import Language

    guide = Language(model, {"lark_grammar": 'start: "yes" | "no"'}, "<think", "grammar").guide()
    for token in b">Well, maybe</think>\n":
        allowed = guide.allowed()
        assert allowed is not None
        assert allowed[token]
        assert not guide.take(token)
    assert np.flatnonzero(guide.allowed()).tolist() == sorted(b"\n yn")
    assert guide.take(ord("y")) == [*b"es", 0]


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "cannot be followed"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}, "no text is of this"),
        ({"grammar": "start: nothing"}, "cannot be followed"),
        ({"grammar": "start: 'a'", "response_format": {"type": "json_object"}}, "exclude each other"),
    ],
)
def test_forms_that_are_none_are_refused(client: Any, extra: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body=extra)


def test_vectors(client: Any, model: LanguageModel) -> None:
    texts = ["A small fish", "the deep blue sea " * 20]
    got = client.embeddings.create(model="tiny", input=texts)
    plain = client.embeddings.create(
        model="tiny", input=[list(text.encode()) for text in texts], encoding_format="float"
    )
    for text, coded, written in zip(texts, got.data, plain.data, strict=True):
        mean = model.outputs(model.text_tokenizer.encode(text), model.new_state()).astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(coded.embedding, mean / np.linalg.norm(mean), rtol=1e-5)
        assert coded.embedding == written.embedding
        assert math.isclose(sum(x * x for x in coded.embedding), 1, rel_tol=1e-5)
    assert got.usage.prompt_tokens == sum(map(len, texts))
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="tiny", input="x", dimensions=7)


def test_an_answer_is_the_same_with_what_is_known_and_without(start: Any, client: Any) -> None:
    fresh = start(cache=False)
    with openai.OpenAI(base_url=f"{fresh.url}/v1", api_key="any") as other:
        messages: list[Any] = [{"role": "user", "content": "Tell me of the sea. " * 12}]
        for turn in range(3):
            ask: dict[str, Any] = {"model": "tiny", "messages": messages, "seed": turn, "max_tokens": 40}
            got, want = client.chat.completions.create(**ask), other.chat.completions.create(**ask)
            assert got.choices[0].message.content == want.choices[0].message.content
            cached = got.usage.prompt_tokens_details.cached_tokens
            assert turn == 0 or cached > 240
            assert want.usage.prompt_tokens_details.cached_tokens == 0
            said = got.choices[0].message.content
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]


def test_an_answer_that_fails_is_an_error(client: Any, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chooser, "sample", lambda *_: 1 // 0)
    for stream in (False, True):
        with pytest.raises(openai.APIError, match="the server's operator sees why"):
            list(client.chat.completions.create(model="tiny", messages=HELLO, stream=stream))
    assert "ZeroDivisionError" in served.said[-1]
