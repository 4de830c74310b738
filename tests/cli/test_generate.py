"""rwkv generate: where prompts come from, where text goes, and how it ends."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from click.testing import Result

import rwkv_cli
from rwkv_cli.commands.texts import read_text

Run = Callable[..., Result]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "RWKV_MODEL"}


def quiet(stderr: str) -> str:
    """Return standard error without the note that kernels are compiled."""
    return "\n".join(line for line in stderr.splitlines() if not line.startswith("Compiling kernels"))


@pytest.fixture
def greedy(rwkv: Run, byte_model: Path) -> Run:
    """Twenty bytes of greedy text that does not end early."""

    def run(*args: object, **kwargs: Any) -> Result:
        return rwkv("generate", *args, "-m", byte_model, "-n", 20, "--temperature", 0, "--ignore-eos", **kwargs)

    return run


def expected(path: Path, prompt: bytes, n: int = 20) -> str:
    """Greedy text with the default penalties, token by token."""
    model = rwkv_cli.load(path)
    logits, state = model.forward(list(prompt))
    counts: dict[int, float] = {}
    out = []
    for _ in range(n):
        scores = logits.astype(float)
        scores[0] = -np.inf
        for token, count in counts.items():
            scores[token] -= 0.2 + 0.2 * count
        out.append(int(scores.argmax()))
        counts = {token: 0.996 * count for token, count in counts.items()}
        counts[out[-1]] = counts.get(out[-1], 0) + (out[-1] not in b" \t0123456789")
        logits, state = model.forward(out[-1:], state)
    return bytes(out).decode("utf-8", "replace")


def test_text_is_that_of_the_model(greedy: Run, byte_model: Path) -> None:
    result = greedy("Once upon")
    assert result.exit_code == 0
    assert result.stdout == expected(byte_model, b"Once upon")
    assert quiet(result.stderr) == ""


@pytest.mark.parametrize(
    ("args", "given", "prompt"),
    [
        ((), "Once upon", "Once upon"),
        ((), "Once upon\n", "Once upon"),
        ((), "Once upon\r\n", "Once upon"),
        ((), "Once upon\n\n", "Once upon\n"),
        (("-",), "Once\nupon\n", "Once\nupon"),
        (("Sum up:",), "Dear\nAunt,\n", "Sum up:\n\nDear\nAunt,"),
        (("Sum up:\n",), "\n", "Sum up:\n"),
        (("Sum up:", "-", "In short:"), "Dear Aunt\n", "Sum up:\n\nDear Aunt\n\nIn short:"),
        (("-", "In short:"), "Dear Aunt\n", "Dear Aunt\n\nIn short:"),
        (("Once upon\n",), None, "Once upon\n"),
        (("Привет 👋",), None, "Привет 👋"),
        ((), b"\xff\xfd", "��"),
        (("\udcff",), None, "�"),
    ],
)
def test_where_the_prompt_comes_from(greedy: Run, args: tuple[str, ...], given: Any, prompt: str) -> None:
    result = json.loads(greedy(*args, "--json", input=given).stdout)
    assert result["prompt"] == prompt
    if "�" not in prompt:
        assert result["prompt_tokens"] == len(prompt.encode())
        assert result["text"] == greedy(prompt).stdout


def test_a_terminal_is_not_read_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO(b"typed\n")))
    with pytest.raises(Exception, match="no text: give one as an argument or on standard input"):
        read_text([], needed=True)
    assert read_text([], needed=False) == b""
    assert read_text(["Once"], needed=True) == b"Once"
    assert read_text(["-"], needed=True) == b"typed"


@pytest.mark.parametrize(("args", "says"), [(("Once", "upon"), "put quotes around"), (("-", "-"), "- is given twice")])
def test_what_cannot_be_joined_is_said(greedy: Run, args: tuple[str, ...], says: str) -> None:
    result = greedy(*args, input="a")
    assert result.exit_code == 2
    assert says in result.stderr


def test_json_says_how_it_went(rwkv: Run, byte_model: Path) -> None:
    result = rwkv("generate", "Once", "-m", byte_model, "-n", 30, "--ignore-eos", "--seed", 3, "--json")
    facts = json.loads(result.stdout)
    assert set(facts) == {"model", "prompt", "text", "stop", "seed", "prompt_tokens", "cached_tokens", "tokens",
                          "prompt_tokens_per_second", "tokens_per_second"}  # fmt: skip
    assert (facts["model"], facts["stop"], facts["seed"]) == (str(byte_model), "length", 3)
    assert (facts["prompt_tokens"], facts["cached_tokens"], facts["tokens"]) == (4, 0, 30)
    assert min(facts["prompt_tokens_per_second"], facts["tokens_per_second"]) > 0
    assert result.stdout.count("\n") == 1
    assert result.stdout.isascii()  # a terminal may take a raw U+009B for an escape sequence


def test_same_seed_same_text(rwkv: Run, byte_model: Path) -> None:
    def text(*options: object) -> str:
        return rwkv("generate", "Once", "-m", byte_model, "-n", 40, "--ignore-eos", *options).stdout

    first = text("--seed", 1)
    assert first == text("--seed", 1)
    assert first != text("--seed", 2)
    assert text() != text()  # a random seed; 40 bytes of nearly uniform noise
    assert text("--top-k", 1) == text("--temperature", 0)
    assert text("--presence-penalty", 90, "--temperature", 0) != text("--temperature", 0)


def test_a_stop_text_ends_the_text_before_it(greedy: Run) -> None:
    whole = greedy("Once upon").stdout
    stop = whole[7:9]
    at = whole.index(stop)
    assert greedy("Once upon", "--stop", "never there", "--stop", stop).stdout == whole[:at]
    facts = json.loads(greedy("Once upon", "--stop", stop, "--json").stdout)
    assert (facts["text"], facts["stop"]) == (whole[:at], "stop")


def test_the_end_token_ends_the_text(rwkv: Run, byte_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rwkv_cli.engine.sampling as sampling

    monkeypatch.setattr(sampling.Sampler, "sample", lambda *_: 0)
    facts = json.loads(rwkv("generate", "Once", "-m", byte_model, "--json").stdout)
    assert (facts["text"], facts["stop"], facts["tokens"]) == ("", "eos", 1)


def test_the_model_may_come_from_the_environment(rwkv: Run, byte_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_MODEL", str(byte_model))
    assert rwkv("generate", "Once", "-n", 3).exit_code == 0
    monkeypatch.setenv("RWKV_MODEL", "")
    assert "RWKV_MODEL" in rwkv("generate", "Once", "-n", 3).stderr


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("-m", "{byte}", ""), 2, "the prompt is empty; give some text to go on with"),
        (("-m", "{byte}"), 2, "the prompt is empty; give some text to go on with"),
        (("hi", "-m", "{none}"), 1, "{none}: has no tokenizer, so it cannot read text; convert it again with"),
        (("hi", "-m", "missing.st"), 1, "missing.st: No such file or directory"),
        (("hi", "-m", "{empty}"), 1, "{empty}"),
        (("hi", "-m", "{byte}", "--stop", ""), 2, "--stop: an empty text"),
        (("hi", "-m", "{byte}", "-n", "0"), 2, "'--max-tokens'"),
        (("hi", "-m", "{byte}", "--temperature", "-1"), 2, "'--temperature'"),
        (("hi", "-m", "{byte}", "--temperature", "nan"), 2, "'--temperature': nan is not a finite number"),
        (("hi", "-m", "{byte}", "--presence-penalty", "inf"), 2, "'--presence-penalty': inf is not in the range"),
        (("hi", "-m", "{byte}", "--top-p", "1.5"), 2, "'--top-p'"),
        (("hi", "-m", "{byte}", "--top-k", "1.5"), 2, "'--top-k'"),
        (("hi", "-m", "{byte}", "--seed", "-1"), 2, "'--seed'"),
        (("hi", "-m", "{byte}", "--threads", "100000"), 1, "threads must be from 1 to"),
        (("hi", "-m", "{byte}", "--device", "tpu"), 2, "'--device'"),
        (("ab\udcff", "-m", "{json}"), 2, "the prompt is not UTF-8 at byte 2;"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence(
    rwkv: Run,
    byte_model: Path,
    converted: Any,
    json_model: Path,
    tmp_path: Path,
    args: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    names = {
        "byte": byte_model, "none": converted(), "json": json_model,
        "pth": byte_model.with_suffix(".pth"), "empty": tmp_path,
    }  # fmt: skip
    result = rwkv("generate", *(arg.format(**names) for arg in args), input="")
    assert result.exit_code == code
    assert result.stdout == ""
    errors = [line for line in quiet(result.stderr).splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert quiet(result.stderr).endswith(errors[0])
    assert says.format(**names) in errors[0]


@pytest.fixture(scope="session")
def json_model(tmp_path_factory: pytest.TempPathFactory, converted: Any) -> Path:
    """A tiny model whose tokenizer takes text only."""
    from click.testing import CliRunner

    from rwkv_cli.main import cli

    folder = tmp_path_factory.mktemp("json")
    vocabulary = {"<|endoftext|>": 0}
    for character in tokenizers.pre_tokenizers.ByteLevel.alphabet():
        vocabulary[character] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    source = converted().with_suffix(".pth")
    command = ["convert", str(source), str(folder / "m"), "--tokenizer", str(folder / "tokenizer.json")]
    assert CliRunner().invoke(cli, command).exit_code == 0
    return folder / "m"


def test_text_of_a_json_tokenizer(rwkv: Run, json_model: Path) -> None:
    result = rwkv("generate", "Привет", "-m", json_model, "-n", 40, "--ignore-eos", "--seed", 1)
    assert result.exit_code == 0
    assert result.stdout


def test_a_process_keeps_text_and_the_rest_apart(byte_model: Path, greedy: Run) -> None:
    command = [sys.executable, "-m", "rwkv_cli", "generate", "-n", "20", "--temperature", "0", "--ignore-eos"]
    done = subprocess.run(
        command, env=ENVIRONMENT | {"RWKV_MODEL": str(byte_model), "PYTHONIOENCODING": "utf-8"},
        input=b"Once upon\n", capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.decode() == greedy("Once upon").stdout
    assert quiet(done.stderr.decode()) == ""


def test_a_closed_pipe_ends_it_quietly(byte_model: Path, tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m rwkv_cli generate hi -m '{byte_model}' --ignore-eos -n 100000 2>'{tmp_path}/err'"
    done = subprocess.run(
        ["sh", "-c", f"{{ {command}; echo $? >'{tmp_path}/code'; }} | head -c 5"], capture_output=True, timeout=300,
        env=ENVIRONMENT, check=True,
    )  # fmt: skip
    assert len(done.stdout) == 5
    assert quiet((tmp_path / "err").read_text()) == ""
    assert (tmp_path / "code").read_text().strip() in ("1", "141")


def test_ctrl_c_ends_it_without_a_traceback(byte_model: Path) -> None:
    options = "-m", str(byte_model), "--ignore-eos", "-n", "10000000"
    command = [sys.executable, "-m", "rwkv_cli", "generate", "hi", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(20)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 1
    assert quiet(stderr.decode()).strip() == "Aborted!"
