"""rwkv chat: templates, what the state has read turn after turn, commands, and a real terminal."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import Result
from naive import error_ratio

import rwkv_cli
from rwkv_cli.chat import Conversation
from rwkv_cli.models import Model
from rwkv_cli.sampling import Sampler, Sampling
from rwkv_cli.templates import TEMPLATES, Template, guess

Run = Callable[..., Result]
# Python ignores SIGINT where its parent did, as the children of a background shell do
SCRIPT = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from rwkv_cli.main import main; main()"
)
GREETING = (
    "User: hi\n\nAssistant: Hi. I am your assistant and I will provide expert full response in full details. "
    "Please feel free to ask any question and I will always answer it.\n\n"
)


@pytest.mark.parametrize(
    ("name", "opening", "turn"),
    [
        ("world", GREETING, "User: a\nb\n\nAssistant:"),
        ("g1", "", "User: a\nb\n\nAssistant:"),
        ("raven", "", "Bob: a\nb\n\nAlice:"),
        ("qa", "\n", "Q: a\nb\n\nA:"),
        ("plain", "", "User: a\nb\n\nAssistant:"),
    ],
)
@pytest.mark.parametrize("text", ["a\nb", "  a\n\n\nb\n", "a\r\nb", "a\r\n\r\nb\r\n"])
def test_templates_write_a_turn(name: str, opening: str, turn: str, text: str) -> None:
    template = TEMPLATES[name]
    assert (template.opening, template.prompt(text)) == (opening, turn)
    assert template.prompt("{text} {0} %s") == template.turn.replace("{text}", "{text} {0} %s")
    assert all(stop not in template.prompt(text).split(":", 1)[1][: len("a b")] for stop in template.stops)


def test_templates_sample_as_their_authors() -> None:
    assert TEMPLATES["world"].sampling == Sampling(1.0, 0.3, presence_penalty=0.5, frequency_penalty=0.5)
    assert TEMPLATES["raven"].sampling == Sampling(1.2, 0.5, presence_penalty=0.4, frequency_penalty=0.4)


@pytest.mark.parametrize(
    ("name", "tokenizer", "vocab", "want"),
    [
        ("RWKV-4-Raven-7B-v11-Eng99%-Other1%-20230427-ctx8192.pth", "json", 50277, "raven"),
        ("RWKV-4-Pile-169M-20220807-8023.pth", "json", 50277, "qa"),
        ("RWKV-4-World-0.1B-v1-20230520-ctx4096.pth", "world", 65536, "world"),
        ("RWKV-5-World-1B5-v2-20231025-ctx4096.pth", "world", 65536, "world"),
        ("RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth", "world", 65536, "world"),
        ("RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth", "world", 65536, "world"),
        ("rwkv7-g1-0.1b-20250307-ctx4096.pth", "world", 65536, "g1"),
        ("rwkv7-g1a-0.4b-20250905-ctx4096.pth", "world", 65536, "g1"),
        ("rwkv7-g0-7.2b-20250722-ctx4096.pth", "world", 65536, "g1"),
        ("RWKV-x070-Pile-168M-20241120-ctx4096.pth", "json", 50304, "qa"),
        ("big1-model.pth", "bytes", 256, "plain"),
        ("model.pth", None, 300, "plain"),
    ],
)
def test_the_template_is_guessed_from_official_names(name: str, tokenizer: str | None, vocab: int, want: str) -> None:
    assert guess(name, tokenizer, vocab) == want


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model over bytes that has learnt nothing writes mostly what is no text; let it pick from four."""
    pick = Sampler.pick

    def picked(sampler: Sampler, logits: Any) -> int:
        return pick(sampler, np.where([i in b"ab \n" for i in range(256)], logits, -1e30))

    monkeypatch.setattr(Sampler, "pick", picked)


def talk(model: Any, template: Template, settings: Sampling, n: int, *turns: str) -> tuple[Conversation, str]:
    """A conversation after these turns, and all that was said in it."""
    conversation = Conversation(model, template, settings, 5, n)
    transcript = template.opening
    for turn in turns:
        completion = conversation.completion()
        shown = "".join(conversation.listen(completion, turn))
        assert shown == completion.text.lstrip()
        transcript += template.prompt(turn) + completion.text + template.end
    return conversation, transcript


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize("stops", [("\n\n",), ("\nab", "aab"), ("\n b", "\n\n", "b")])
@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_state_has_read_the_transcript(byte_model: Path, stops: tuple[str, ...], n: int, seed: int) -> None:
    model = rwkv_cli.load(byte_model)
    template = Template("Q: {text}\n\nA:", stops, Sampling(1.5 + seed, 1.0), "opening\n")
    conversation, transcript = talk(model, template, template.sampling, n, "Hi", "Three\n\ndays", "é")
    rest = conversation.unread.encode()
    assert transcript.encode().endswith(rest)
    got, state = model.forward(list(rest), conversation.state)
    want, whole = model.forward(list(transcript.encode()))
    assert error_ratio(got, want) < 1e-5
    assert error_ratio(state.wkv, whole.wkv) < 1e-5


def test_reset_forgets(byte_model: Path) -> None:
    model, template = rwkv_cli.load(byte_model), TEMPLATES["world"]
    conversation, _ = talk(model, template, template.sampling, 9, "Hi")
    first = [list(conversation.listen(conversation.completion(), "again")) for _ in range(2)]
    assert first[0] != first[1]
    conversation.reset()
    fresh = Conversation(model, template, template.sampling, 5, 9)
    assert conversation.unread == fresh.unread == GREETING
    np.testing.assert_array_equal(conversation.state.wkv, model.new_state().wkv)
    a, b = (list(c.listen(c.completion(), "Hi")) for c in (conversation, fresh))
    assert a == b


def test_a_turn_interrupted_before_it_was_read_never_happened(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rwkv_cli.load(byte_model)
    conversation, _ = talk(model, TEMPLATES["plain"], Sampling(), 5, "Hi")
    before, unread = conversation.state.clone(), conversation.unread
    completion = conversation.completion()
    advance = Model.advance

    def interrupted(*args: Any) -> Any:
        completion.cancelled = True
        return advance(*args)

    monkeypatch.setattr(type(model), "advance", interrupted)
    assert list(conversation.listen(completion, "x" * 1000)) == []
    assert conversation.unread == unread
    np.testing.assert_array_equal(conversation.state.wkv, before.wkv)
    np.testing.assert_array_equal(conversation.state.att_shift, before.att_shift)


@pytest.fixture
def chat(rwkv: Run, byte_model: Path) -> Run:
    """A chat whose turns come through a pipe."""

    def run(*options: object, input: str | bytes = "") -> Result:
        return rwkv("chat", "-m", byte_model, "-n", 12, "--seed", 5, *options, input=input)

    return run


@pytest.mark.usefixtures("letters")
def test_turns_come_through_a_pipe(chat: Run, byte_model: Path) -> None:
    result = chat("--template", "qa", "--top-p", 1, input="Hi\n\n  \nThere")
    template = TEMPLATES["qa"]
    settings = Sampling(top_p=1.0)
    _, transcript = talk(rwkv_cli.load(byte_model), template, settings, 12, "Hi", "There")
    answers = re.split(r"Q: .*\n\nA:", transcript.removeprefix(template.opening))[1:]
    assert result.exit_code == 0
    assert result.stdout == "".join(answer.removesuffix("\n\n").lstrip() + "\n" for answer in answers)


def test_commands(chat: Run) -> None:
    result = chat(input="/help\n/nothing here\n/reset\n/exit\nHi\n")
    assert (result.exit_code, result.stdout) == (0, "")
    lines = result.stderr.splitlines()
    assert lines[0].startswith("/reset")
    assert "/nothing here is not a command." in lines
    assert lines[-1] == "The conversation is forgotten."
    assert chat(input="").stdout == ""
    once, again = chat(input="Hi\n").stdout, chat(input="Hi\n/reset\nHi\n").stdout
    assert once + once == again
    assert chat(input="Hi\nHi\n").stdout != again


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--template", "none"), 2, "'--template'"),
        (("--max-tokens", 0), 2, "'--max-tokens'"),
        (("-m", "missing.st"), 1, "missing.st: No such file or directory"),
    ],
)
def test_what_is_wrong_is_said(chat: Run, options: tuple[object, ...], code: int, says: str) -> None:
    result = chat(*options, input="Hi\n")
    assert result.exit_code == code
    assert says in result.stderr.splitlines()[-1]


def test_an_unknown_template_in_the_file_is_named(chat: Run, byte_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TEMPLATES, "plain")
    result = chat(input="Hi\n")
    assert result.stderr.splitlines()[-1] == (
        f"Error: {byte_model}: its chat template 'plain' is unknown; choose one with --template"
    )
    assert chat("--template", "qa", input="Hi\n").exit_code == 0


def test_output_that_is_not_finite_ends_the_chat(chat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "advance", lambda *_: np.full(256, np.nan, np.float32))
    result = chat(input="Hi\n")
    assert result.exit_code == 1
    assert "the model's output is not finite" in result.stderr.splitlines()[-1]


@pytest.fixture
def terminal(rwkv: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A chat on a terminal, with a model that never ends an answer: the logit of 0 is about −100."""
    pexpect = pytest.importorskip("pexpect")
    weights = tiny.weights("7", vocab=256)
    weights["ln_out.bias"][0], weights["head.weight"][:, 0] = 10, 0
    weights["head.weight"][0, 0] = -10
    assert rwkv("convert", tiny.write_pth(tmp_path / "m.pth", weights, "F32"), tmp_path / "m").exit_code == 0
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("RWKV_MODEL", raising=False)
    options = ["chat", "-m", str(tmp_path / "m"), "--top-p", "1", "--template", "g1", "-n", "1000000"]
    child = pexpect.spawn(sys.executable, ["-c", SCRIPT, *options], timeout=240, dimensions=(24, 500))
    try:
        yield child
    finally:
        child.close(force=True)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_terminal(terminal: Any) -> None:
    """Answers of a million bytes: each Ctrl-C ends one, and what the model babbles steers nothing."""
    prompt = "\x1b[1m> \x1b[0m"
    terminal.expect_exact("/help lists commands")
    for turn in ("Hi", "There"):
        terminal.expect_exact(prompt)
        terminal.sendline(turn)
        terminal.expect(re.compile(rb"[^\r\n]{20}|\n[^\n]{20}"))
        terminal.expect_exact("�".encode())
        terminal.sendintr()
        terminal.expect_exact("\r\n\r\n")
        said = terminal.before.replace(b"^C", b"")
        assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]|\r(?!\n)", said)
    terminal.expect_exact(prompt)
    terminal.sendintr()
    terminal.expect_exact("(/exit or Ctrl-D leaves)")
    terminal.expect_exact(prompt)
    terminal.sendline("/help")
    terminal.expect_exact("forget the conversation")
    terminal.expect_exact(prompt)
    terminal.sendeof()
    rest = terminal.read()
    terminal.wait()
    assert terminal.exitstatus == 0
    assert b"Traceback" not in rest


def test_penalties_are_for_one_answer(byte_model: Path) -> None:
    template = TEMPLATES["world"]
    conversation, _ = talk(rwkv_cli.load(byte_model), template, template.sampling, 9, "Hi")
    assert conversation.sampler._counts
    conversation.completion()
    assert not conversation.sampler._counts
