"""The chat template of G1h: the official prompts, and a chat turn by turn that reads the same."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from naive import error_ratio
from talking import written

import rwkv_cli
from rwkv_cli.engine.conversation import Conversation
from rwkv_cli.engine.conversion import find_tokenizer
from rwkv_cli.engine.g1h import STYLES
from rwkv_cli.engine.messages import read_chat
from rwkv_cli.engine.rendered import Rendered, is_g1h
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.engine.sessions import Session
from rwkv_cli.engine.templates import TEMPLATES, recognize
from rwkv_cli.engine.tokenizer import official_vocabulary
from rwkv_cli.errors import ConversationError, MessagesError

THINK = {"open_think": "on", "fake_think": "off"}
USER = {"role": "user", "content": "Hi \r\n\r\nyou\t"}
CALLED = [
    {"role": "developer", "content": "Be\n\nkind. "},
    {"role": "user", "content": [{"type": "text", "text": "Add"}, {"type": "text", "text": "1 and 2"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1, "é": 2}'}}],
    },
    {"role": "tool", "content": "no JSON"},
]
ADD = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
TOOL_PROMPT = """### System
Be

kind.
### `add`
**Description:** Adds.
**Parameters:**
```json
{
  "type": "object"
}
```
To call one of these tools, write exactly this format:
**Tool Call:**
```json
{"name": "tool_name", "arguments": {"key": "value"}}
```
Do not invent tool call IDs or write tool outputs yourself.
### User
Add
1 and 2
### Assistant
**Tool Call:**
```json
{
  "name": "add",
  "arguments": {
    "a": 1,
    "é": 2
  }
}
```
### Tool Output
```json
"no JSON"
```
### Assistant
<think"""


def greedy(text: str, words: dict[bytes, int]) -> list[int]:
    """Token 0 and the ids of a text by the longest token at each place, as plainly as that can be written."""
    data, ids = text.encode(), [0]
    while data:
        size = next(n for n in range(min(128, len(data)), 0, -1) if data[:n] in words)
        ids.append(words[data[:size]])
        data = data[size:]
    return ids


def world_tokens() -> dict[bytes, int]:
    """The tokens of the official vocabulary, and their ids."""
    words = {}
    for line in official_vocabulary().read_text("utf-8").splitlines():
        number, word = line.split(" ", 1)
        token = eval(word.rsplit(" ", 1)[0])
        words[token.encode() if isinstance(token, str) else token] = int(number)
    return words


def test_the_official_prompts(shared: Path) -> None:
    vectors = json.loads((shared / "vectors" / "g1h-prompts.json").read_text("utf-8"))
    tokenizer, words = find_tokenizer("world", Path("model.pth"), 65536), world_tokens()
    assert tokenizer is not None
    assert len(vectors) == 42
    for vector in vectors:
        chat = read_chat(json.dumps({"messages": vector["messages"], "tools": vector["tools"]}).encode(), "x")
        form = STYLES[vector["style_asked"]].for_chat(chat)
        text = form.whole(chat, THINK[vector["thinking"]])
        assert (text, form.style, form.stops) == (vector["prompt"], vector["style_used"], (vector["stop"],))
        assert [*form.first_ids, *form.encode(tokenizer, text)] == greedy(vector["prompt"], words)


@pytest.mark.parametrize(
    ("style", "think", "messages", "want"),
    [
        ("bot", "on", [USER], "User✿Hi\nyou✿\nBot✿<think"),
        ("bot", "fast", [USER], "User✿Hi\nyou✿\nBot✿<think></think"),
        (
            "bot",
            "off",
            [{"role": "system", "content": "A\n\nb"}, USER, {"role": "assistant", "content": "C \n\nd\n"}, USER],
            "System✿A\n\nb✿\nUser✿Hi\nyou✿\nBot✿C\n\nd✿\nUser✿Hi\nyou✿\nBot✿<think></think",
        ),
        (
            "assistant",
            "on",
            [USER, {"role": "assistant", "content": ""}, USER],
            "User: Hi\nyou\n\nAssistant:\n\nUser: Hi\nyou\n\nAssistant: <think",
        ),
        ("function_calling", "off", [USER], "### User\nHi\nyou\n### Assistant\n<think></think"),
    ],
)
def test_prompts_of_each_style(style: str, think: str, messages: list[Any], want: str) -> None:
    assert written(STYLES[style], think, messages) == want


@pytest.mark.parametrize("style", STYLES)
def test_tools_have_a_style_of_their_own(style: str) -> None:
    assert written(STYLES[style], "on", CALLED, ADD) == TOOL_PROMPT


def test_older_templates_write_messages_too() -> None:
    user = {"role": "user", "content": "Hi\n\nyou "}
    said = [{"role": "system", "content": "S"}, user, {"role": "assistant", "content": "Yes."}, user]
    assert written(TEMPLATES["g1"], "on", said) == (
        "System: S\n\nUser: Hi\nyou\n\nAssistant: Yes.\n\nUser: Hi\nyou\n\nAssistant: <think"
    )
    with pytest.raises(ConversationError, match="template g1 cannot write tools; --template g1h can"):
        written(TEMPLATES["g1"], "on", CALLED, ADD)
    with pytest.raises(ConversationError, match="template world needs user and assistant to take turns"):
        written(TEMPLATES["world"], "off", [USER, USER])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[", "is no JSON"),
        (b"[]", "holds no messages"),
        (b'{"tools": []}', "holds no messages"),
        (b"[1]", "message 1 is no object"),
        (b'[{"role": "user", "content": "\\ud800"}]', "holds half a surrogate pair"),
        (b'[{"role": "user"}, {"role": "judge"}]', "message 2 has the role 'judge'; there are system, user"),
        (b'[{"role": "user", "content": [{"type": "image_url"}]}]', "message 1 has content that is no text"),
        (b'[{"role": "assistant", "tool_calls": [{}]}]', "message 1 has tool_calls that are no list"),
        (b'{"messages": [{"role": "user"}], "tools": [{}]}', "tools are a list of"),
    ],
)
def test_what_is_wrong_with_messages_is_said(data: bytes, says: str) -> None:
    with pytest.raises(MessagesError, match=r"chat\.json: ") as caught:
        read_chat(data, "chat.json")
    assert says in str(caught.value)


def test_a_role_of_any_length_makes_a_short_sentence() -> None:
    with pytest.raises(MessagesError) as caught:
        read_chat(json.dumps([{"role": "x" * 100_000}]).encode(), "chat.json")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "tokenizer", "want", "sure"),
    [
        ("rwkv7-g1h-2.9b-20260710-ctx10240.pth", "world", "g1h", True),
        ("RWKV7-G1k-13.3B-20260930-ctx25600", "world", "g1h", True),
        ("rwkv7-g1d-0.4b-20260815-ctx8192.pth", "world", "g1", True),
        ("rwkv7-g0a3-7.2b-20251029-ctx8192.pth", "world", "g1", True),
        ("rwkv7-g1-1.5b-20250429-ctx4096.pth", "world", "g1", True),
        ("rwkv7-g1-1.5b-20260801.pth", "world", "g1h", False),
        ("rwkv7-g1m-1.5b.pth", "world", "g1h", False),
        ("rwkv7-g2a-1.5b.pth", "world", "g1h", False),
        ("rwkv7-7.2b-20260709.pth", "world", "world", False),
        ("rwkv7-7.2b-20260710.pth", "world", "g1h", False),
        ("storyteller.pth", "json", "plain", True),
        ("model.pth", "bytes", "plain", False),
    ],
)
def test_the_series_tells_the_template(name: str, tokenizer: str, want: str, sure: bool) -> None:
    assert recognize(name, tokenizer, 65536) == (want, sure)


def test_sampling_follows_the_mode(byte_model: Path) -> None:
    template = STYLES["bot"]
    talk = Conversation(rwkv_cli.load(byte_model), template, template.sampling_for("on"), think="on")
    assert (talk.settings.temperature, talk.settings.top_p, talk.settings.penalty_decay) == (0.96, 0.76, 0.988)
    talk.settings = talk.settings.changed(temperature=0.5)
    talk.set_think("fast")
    assert talk.settings == Sampling(0.5, 0.28, 32, presence_penalty=0.0, frequency_penalty=0.0)
    with pytest.raises(ConversationError, match="template g1h has no think mode short; it has on, off, fast"):
        talk.set_think("short")


def answering(monkeypatch: pytest.MonkeyPatch, answers: str) -> None:
    """Let models write these bytes."""
    said = iter(answers.encode())
    monkeypatch.setattr(Sampler, "sample", lambda *_: next(said))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[int]]]:
    """The prompts that were read since the last call."""
    from rwkv_cli.engine import conversation

    prompts: list[list[int]] = []
    request = conversation.Request

    def noted(prompt: list[int], *rest: Any) -> Any:
        prompts.append(prompt)
        return request(prompt, *rest)

    def taken() -> list[list[int]]:
        found, prompts[:] = list(prompts), []
        return found

    monkeypatch.setattr(conversation, "Request", noted)
    return taken


SAID = {
    "bot": ">hm</think>A ✿>b</think>C✿>c</think>D✿",
    "assistant": ">hm</think>A\n\nUser:>b</think>C\nUser:>c</think>D\n\nUser:",
    "function_calling": ">hm</think>A\n### User>b</think>C\n### User>c</think>D\n### User",
}


@pytest.mark.parametrize("style", STYLES)
def test_a_chat_reads_what_its_messages_say(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch, reads: Callable[[], list[list[int]]], style: str
) -> None:
    template = STYLES[style]
    talk = Conversation(rwkv_cli.load(byte_model), template, Sampling(), think="on", system="Be\n\nkind.")
    answering(monkeypatch, SAID[style])
    for text in ("one", "two"):
        list(talk.reply(text).stream())
    first, second = reads()
    messages = [{"role": "system", "content": "Be\n\nkind."}, {"role": "user", "content": "one"}]
    assert bytes(first) == b"\0" + written(template, "on", messages).encode()
    messages += [{"role": "assistant", "content": "<think>hm</think>A"}, {"role": "user", "content": "two"}]
    whole = written(template, "on", messages)
    assert second[0] != 0
    assert whole.endswith(bytes(second).decode())
    shown = [turn.shown() for turn in talk.turns]
    assert [text.strip() for text in shown] == ["A", "C"]
    talk.undo()
    talk.undo()
    list(talk.reply("one").stream())
    assert reads() == [first]


@pytest.mark.parametrize("own", [False, True])
def test_undo_past_the_kept_states_reads_the_same(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch, reads: Callable[[], list[list[int]]], own: bool
) -> None:
    """Token 0 and the reasoning of earlier answers are read once more, too."""
    template = Rendered.of(CHATML, {}) if own else STYLES["bot"]
    talk = Conversation(rwkv_cli.load(byte_model), template, Sampling(), think="on", system="S")
    end = "<|end|>" if own else "✿"
    answering(monkeypatch, "".join(f">hm</think>{letter}{end}" for letter in "ABCC"))
    for text in ("one", "two", "three"):
        list(talk.reply(text).stream())
    want, asked = talk.now, reads()[2]
    for turn in talk.turns:
        turn.before = None
    talk.undo()
    list(talk.reply("three").stream())
    assert own or reads() == [asked]
    got = talk.now
    assert [turn.user for turn in talk.turns] == ["one", "two", "three"]
    assert error_ratio(got.state.wkv, want.state.wkv) < 1e-5


def test_a_session_keeps_the_style(byte_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_cli.engine.sessions.folder", lambda: tmp_path)
    model, template = rwkv_cli.load(byte_model), STYLES["assistant"]
    talk = Conversation(model, template, template.sampling_for("off"), think="off", max_tokens=5)
    list(talk.reply("one").stream())
    Session("a").save(talk)
    _, again = Session.resume("a", model)
    assert (again.template, again.think, again.settings) == (template, "off", template.skipped)
    assert again.now.unread == talk.now.unread
    # sessions of before there were styles lack the word
    path = tmp_path / "a" / "transcript.json"
    data = json.loads(path.read_text("utf-8"))
    del data["style"]
    path.write_text(json.dumps(data | {"template": "plain"}), "utf-8")
    assert Session.resume("a", model)[1].template == TEMPLATES["plain"]


LIKE_G1H = """
{%- set tooled = tools or rwkv_prompt_template == 'function_calling' or messages | selectattr('tool_calls') | list -%}
{%- set n = namespace(parts=[]) -%}
{%- for m in messages -%}
{%- if not tooled -%}
{%- set label = {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[m.role] -%}
{%- set text = 'ANSWER' if rwkv_prompt_template == 'bot' and m.role == 'assistant' else label -%}
{%- set bot = (text ~ '✿' ~ m.content ~ '✿') | replace('ANSWER', 'Bot') -%}
{%- set n.parts = n.parts + [bot if rwkv_prompt_template == 'bot' else label ~ ': ' ~ m.content] -%}
{%- elif m.role == 'tool' -%}
{%- set n.parts = n.parts + ['### Tool Output', '```json', m.rwkv_json_content | tojson(indent=2), '```'] -%}
{%- else -%}
{%- set n.parts = n.parts + ['### ' ~ m.role | capitalize] + ([m.content] if m.content else []) -%}
{%- for c in m.tool_calls or [] -%}
{%- set n.parts = n.parts + ['**Tool Call:**', '```json', c.function | tojson(indent=2), '```'] -%}
{%- endfor -%}
{%- if m.role == 'system' -%}
{%- for t in tools or [] -%}
{%- set f = t.function -%}
{%- set n.parts = n.parts + ['### `' ~ f.name ~ '`', '**Description:** ' ~ f.description, '**Parameters:**'] -%}
{%- set n.parts = n.parts + ['```json', f.parameters | tojson(indent=2), '```'] + ([HOW] if loop.last else []) -%}
{%- endfor -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- set think = '<think' if rwkv_generation_prompt == 'open_think' else '<think></think' -%}
{%- set answer = {'bot': 'Bot✿', 'assistant': 'Assistant: '}.get(rwkv_prompt_template) -%}
{%- set last = ['### Assistant', think] if tooled else [answer ~ think] -%}
{{ bos_token }}{{ (n.parts + last) | join('\\n\\n' if not tooled and rwkv_prompt_template == 'assistant' else '\\n') }}
"""
"""A template that writes what G1h's does, where a chat has a system text and every tool a description."""


@pytest.mark.parametrize("change", [("", ""), ("Bot✿", "Bot ✿"), ("### Tool Output", "### Output")])
def test_a_template_like_g1h_is_known(change: tuple[str, str]) -> None:
    how = TOOL_PROMPT[TOOL_PROMPT.index("To call") : TOOL_PROMPT.index("\n### User")]
    source = LIKE_G1H.strip().replace("HOW", json.dumps(how)).replace(*change)
    assert is_g1h(Rendered.of(source, {"bos_token": "<s>"})) == (change == ("", ""))


CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)


def test_a_template_of_its_own(
    byte_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Callable[[], list[list[int]]]
) -> None:
    """An earlier answer loses its reasoning, so the second prompt is read from the beginning."""
    monkeypatch.setattr("rwkv_cli.engine.sessions.folder", lambda: tmp_path)
    template = Rendered.of(CHATML, {"bos_token": "<s>", "eos_token": ""})
    assert template.stops == ("<|end|>",)
    assert list(template.modes) == ["off", "on"]
    model = rwkv_cli.load(byte_model)
    model.template = replace(model.template, name="own", source=CHATML, special={"bos_token": "<s>"})
    talk = Conversation(model, template, Sampling(), think="on", system="S")
    answering(monkeypatch, "hm\n</think>A<|end|>B<|end|>C<|end|>")
    assert list(talk.reply("one").stream()) == [(True, "hm"), (False, "A")] or talk.turns[0].shown() == "A"
    talk.set_think("off")
    list(talk.reply("two").stream())
    session = Session("a")
    session.save(talk)
    _, talk = Session.resume("a", model)
    list(talk.reply("three").stream())
    begin = "<|system|>\nS<|end|>\n<|user|>\none<|end|>\n<|assistant|>\n"
    second = begin + "A<|end|>\n<|user|>\ntwo<|end|>\n<|assistant|>\n"
    assert [bytes(ids).decode() for ids in reads()] == [
        "\0" + begin + "<think>\n",
        "\0" + second,
        "<|end|>\n<|user|>\nthree<|end|>\n<|assistant|>\n",
    ]
