"""rwkv chat on a real terminal: line editing, streaming, Ctrl-C, kill -9 and resume, wide characters."""

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result
from extras import needs

pexpect = needs("pexpect", "dev", "test_chat.py talks through a pipe")
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

# Python ignores SIGHUP where its parent did, as what nohup starts does
SCRIPT = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); from rwkv_cli.main import main; main()"
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|[\r\x08]")


@pytest.fixture(scope="session")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends an answer: the logit of 0 is about −100."""
    from click.testing import CliRunner

    from rwkv_cli.main import cli

    folder = tmp_path_factory.mktemp("babbler")
    weights = tiny.weights("7", vocab=256)
    weights["ln_out.bias"][0], weights["head.weight"][:, 0] = 10, 0
    weights["head.weight"][0, 0] = -10
    source = tiny.write_pth(folder / "m.pth", weights, "F32")
    result: Result = CliRunner().invoke(cli, ["convert", str(source), str(folder / "m.safetensors")])
    assert result.exit_code == 0, result.output
    return folder / "m.safetensors"


@pytest.fixture
def chat(babbler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Starts `rwkv chat` on a terminal of its own, with the same home each time."""
    for name in ("DATA", "STATE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")
    for name in ("RWKV_MODEL", "NO_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    from rwkv_cli.kernels.cache import cache_folder

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(cache_folder().parent))
    children = []

    def start(*options: str, n: int = 8, columns: int = 200, mark: str = "") -> Any:
        args = ["-c", SCRIPT, "chat", "-m", str(babbler), "--seed", "5", "-n", str(n), "--top-p", "0.9", *options]
        child = spawn(args, columns)
        children.append(child)
        child.expect_exact("/help lists commands" if columns > 60 else "commands")
        if mark:
            child.expect_exact(mark)
        else:
            prompt(child)
        return child

    yield start
    for child in children:
        child.close(force=True)


def spawn(args: list[str], columns: int, program: str = sys.executable) -> Any:
    """Start a program on a terminal of this width. Readline may have put another into this process's environment."""
    return pexpect.spawn(program, args, timeout=120, dimensions=(24, columns), encoding="utf-8", env=dict(os.environ))


def prompt(child: Any) -> str:
    """Wait for the prompt; what came before it, as a person sees it."""
    child.expect_exact("\x1b[?2004h")  # what is pasted is marked from here on
    return ANSI.sub("", child.before)


def ask(child: Any, line: str) -> str:
    """Type a line; what came after it up to the next prompt."""
    child.send(line + "\r")
    return prompt(child)


def leave(child: Any) -> None:
    child.sendeof()
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0
    assert "Traceback" not in child.before


def test_ctrl_c_ends_an_answer_and_not_the_chat(chat: Callable[..., Any]) -> None:
    """Answers of a million bytes; what the model babbles steers nothing."""
    child = chat("--template", "g1", "--think", "off", n=1_000_000)
    for _ in range(2):
        child.send("Hi\r")
        child.expect_exact("�")
        child.expect_exact("�")
        child.sendintr()
        child.expect_exact("interrupted")
        said = child.before.replace("^C", "")
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f\x80-\x9f]|\r(?!\n)", ANSI.sub("", said))
        prompt(child)
    child.sendintr()
    child.expect_exact("/exit or Ctrl-D leaves")
    prompt(child)
    assert "begin anew; /undo takes it back" in ask(child, "/help")
    leave(child)


def test_edit_can_be_given_up(chat: Callable[..., Any]) -> None:
    child = chat()
    ask(child, "//one")
    child.send("/edit\r")
    prompt(child)
    child.expect_exact("//one")
    child.sendintr()
    child.expect_exact("The turn stays as it was.")
    prompt(child)
    assert "> /one" in ask(child, "/history")
    leave(child)


def test_keys_that_are_no_text(chat: Callable[..., Any]) -> None:
    child = chat("--session", "a")
    os.write(child.child_fd, b"caf\xe9\r")
    prompt(child)
    assert "> caf" in ask(child, "/history")
    leave(child)


def test_typing_ahead_does_not_show(chat: Callable[..., Any]) -> None:
    child = chat(n=1000)
    child.send("Hi\r")
    child.expect_exact("�")
    child.send("/undo\r")
    before = prompt(child)
    assert "/undo" not in before
    assert "Taken back: Hi" in prompt(child)
    leave(child)


def test_figures_follow_an_answer(chat: Callable[..., Any]) -> None:
    child = chat()
    after = ask(child, "Hi")
    assert re.search(r"8 tokens, [0-9.]+ tok/s · prompt \d+ tokens, \d+ tok/s · cut short", after)
    assert "Taken back: Hi" in ask(child, "/undo")
    assert "there is no turn yet" in ask(child, "/undo")
    leave(child)


def test_reasoning_is_dim_and_apart(chat: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"from rwkv_cli.engine.sampling import Sampler; said = iter(b'>hm</think>\n\nok\0');"
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", said + "Sampler.sample = lambda *_: next(said);" + SCRIPT)
    child = chat("--template", "g1", "--think", "on", n=100)
    child.send("Hi\r")
    child.expect_exact("\x1b[2mh\x1b[22m\x1b[2mm\x1b[22m\r\n\r\nok\r\n")
    prompt(child)
    leave(child)


def test_history_and_completion(chat: Callable[..., Any]) -> None:
    child = chat()
    ask(child, "first words")
    leave(child)
    child = chat()
    child.send("\x1b[A")  # up
    child.expect_exact("first words")
    child.send("\x03")
    prompt(child)
    child.send("/und\t")
    child.expect_exact("o")
    child.send("\r")
    assert "no turn yet" in prompt(child)
    leave(child)


def test_edit_begins_with_the_last_turn(chat: Callable[..., Any]) -> None:
    child = chat("--session", "a")
    ask(child, "one")
    child.send("/edit\r")
    prompt(child)
    child.expect_exact("one")
    child.send(" more\r")
    prompt(child)
    assert "> one more" in ask(child, "/history")
    leave(child)


def test_several_lines_in_one_turn(chat: Callable[..., Any]) -> None:
    child = chat("--session", "a")
    child.send("one\x1b\rtwo\r")  # Alt-Enter
    prompt(child)
    child.send("\x1b[200~three\rfour\x1b[201~\r")  # pasted
    prompt(child)
    history = ask(child, "/history")
    assert "> one\ntwo\n" in history
    assert "> three\nfour\n" in history
    leave(child)


def test_kill_9_loses_the_running_answer_at_most(chat: Callable[..., Any]) -> None:
    child = chat("--session", "a")
    first = "你好 🙂 é"
    ask(child, first)
    ask(child, "/set max_tokens 1000000")
    child.send("on\r")
    child.expect_exact("�")
    child.kill(signal.SIGKILL)
    child.wait()
    child = chat("--session", "a")
    history = ask(child, "/history")
    assert f"> {first}\n" in history
    assert "> on" not in history
    ask(child, "again")
    history = ask(child, "/history")
    assert "> again" in history
    leave(child)


def test_a_loaded_session_is_named_once(chat: Callable[..., Any]) -> None:
    child = chat()
    ask(child, "one")
    ask(child, "/save kept")
    ask(child, "/reset")
    shown = ask(child, "/load kept")
    assert shown.count("1 turn") == 1
    assert "> one" in shown
    leave(child)


def test_a_hang_up_ends_it(chat: Callable[..., Any]) -> None:
    child = chat("--session", "a", n=1_000_000)
    child.send("Hi\r")
    child.expect_exact("�")
    os.kill(child.pid, signal.SIGHUP)
    child.expect(pexpect.EOF)
    child.wait()
    assert child.signalstatus == signal.SIGHUP


def test_retry_and_undo(chat: Callable[..., Any]) -> None:
    child = chat()
    ask(child, "one")
    ask(child, "two")
    first = ask(child, "/history")
    assert "8 tokens" in ask(child, "/retry")
    second = ask(child, "/history")
    assert second.count("\n> ") == first.count("\n> ") == 2
    assert second != first
    ask(child, "/undo")
    ask(child, "two")
    assert ask(child, "/history").split("> one")[1] == first.split("> one")[1]
    leave(child)


def test_a_broken_session(chat: Callable[..., Any], babbler: Path, tmp_path: Path) -> None:
    child = chat("--session", "a")
    ask(child, "Hi")
    leave(child)
    (transcript,) = tmp_path.rglob("transcript.json")
    transcript.write_text(transcript.read_text("utf-8")[:-20], "utf-8")
    args = ["-c", SCRIPT, "chat", "-m", str(babbler), "--session", "a"]
    child = pexpect.spawn(sys.executable, args, timeout=120, dimensions=(24, 300), encoding="utf-8")
    child.expect_exact("Error: session a is damaged")
    child.expect_exact("remove it with: rwkv sessions rm a")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 1


def test_what_the_chat_itself_says_breaks_between_words(chat: Callable[..., Any]) -> None:
    child = chat(columns=40)
    for command in ("/help", "/set nothing", "/params", "/stats"):
        said = ask(child, command)
        lines = said.split("\n")[1:]
        assert max(map(len, lines)) < 40, lines
        assert not any(re.search(r"[a-z]$", a) and re.match("[a-z]", b) and len(a) == 40 for a, b in pairwise(lines))
    assert "take the last turn back" in " ".join(ask(child, "/help").split())
    words = "some words of a turn that is wider than the terminal and so is broken"
    ask(child, words)
    history = ask(child, "/history")
    for word in words.split():
        assert re.search(rf"\b{word}\b", history.replace("/history", "")), history
    leave(child)


def test_three_lines_pasted_into_a_dumb_terminal_are_one_turn(
    chat: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    child = chat(mark="> ")
    child.send("one\rtwo\rthree\r")
    child.expect_exact("tok/s")
    child.expect_exact("> ")
    child.send("/stats\r")
    child.expect(r"turns +1\b")
    child.expect_exact("> ")
    child.send("/history\r")
    child.expect(r"> one\r\ntwo\r\nthree\r\n")
    child.send("/exit\r")
    child.expect(pexpect.EOF)


def test_a_chat_into_a_pipe_shows_its_prompt(babbler: Path, chat: Callable[..., Any], tmp_path: Path) -> None:
    del chat  # its environment
    log = tmp_path / "log"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(SCRIPT)} chat -m {babbler} -n 3 | tee {log}"
    child = pexpect.spawn("/bin/sh", ["-c", command], timeout=120, encoding="utf-8")
    child.expect_exact("> ")
    child.send("Hi\n")
    child.expect_exact("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert "> " not in log.read_text(errors="replace")


def test_generated_text_breaks_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("RWKV_MODEL", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    args = ["-c", SCRIPT, "generate", "Once upon a time", "--temperature", "0", "-n", "60"]
    texts = []
    for columns in (2000, 30):
        child = spawn(args, columns)
        child.expect_exact("No model named")
        child.expect_exact("storyteller.\r\n")
        child.expect(pexpect.EOF)
        child.close()
        texts.append(shown_lines(child.before.rpartition("Loading")[2].rpartition("\x1b[?25h")[2]))
        assert "No model named" not in child.before
    wide, narrow = texts
    assert max(map(len, narrow)) < 30
    assert " ".join(" ".join(narrow).split()) == " ".join(" ".join(wide).split())


def test_answers_to_piped_turns_break_between_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("RWKV_MODEL", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "turns").write_text("Tell me a story.\n")
    chat = f"{shlex.quote(sys.executable)} -c {shlex.quote(SCRIPT)} chat --temperature 0 -n 60"
    texts = []
    for columns in (2000, 30):
        child = spawn(["-c", f"{chat} < {shlex.quote(str(tmp_path / 'turns'))}"], columns, "/bin/sh")
        child.expect_exact("storyteller.\r\n")
        child.expect(pexpect.EOF)
        child.close()
        texts.append(shown_lines(child.before.rpartition("\x1b[?25h")[2]))
    wide, narrow = texts
    assert max(map(len, narrow)) < 30
    assert " ".join(" ".join(narrow).split()) == " ".join(" ".join(wide).split())


def shown_lines(output: str) -> list[str]:
    """Return the lines that a terminal shows of an output which moves back by \\b and clears to the end of a line."""
    lines = [""]
    for character in re.sub(r"\x1b\[(?!K)[0-9;?]*[A-Za-z]", "", output).replace("\x1b[K", "").replace("\r", ""):
        if character == "\n":
            lines.append("")
        elif character == "\b":
            lines[-1] = lines[-1][:-1]
        else:
            lines[-1] += character
    return lines
