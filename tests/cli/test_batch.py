"""Many prompts at once: each gets the text that it gets alone, and a run that was stopped goes on where it was."""

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
import tiny
from click.testing import Result
from tiny import refused

import rwkv_cli
from rwkv_cli.engine.batch import Batch
from rwkv_cli.engine.completion import Completion, Request
from rwkv_cli.engine.sampling import Sampler, Sampling

Run = Callable[..., Result]
PROMPTS = ["Once upon", "a", "Привет, мир 👋", "x" * 40, "two\nlines\n", "The cat", "é"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "RWKV_MODEL"}


def jsonl(path: Path, lines: list[Any]) -> Path:
    """A file of prompts."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def answers(text: str | Path) -> dict[Any, Any]:
    """An output by its ids, none of them twice."""
    records = [json.loads(line) for line in (text.read_text() if isinstance(text, Path) else text).splitlines()]
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record for record in records}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of prompts whose answers differ in length."""
    return jsonl(tmp_path / "in.jsonl", [{"prompt": p, "max_tokens": 5 + 7 * i} for i, p in enumerate(PROMPTS)])


@pytest.fixture
def batch(rwkv: Run, byte_model: Path) -> Run:
    """rwkv generate --batch on the byte model."""

    def run(file: Path | str, *args: object, seed: int | None = 3, **kwargs: Any) -> Result:
        fixed = [] if seed is None else ["--seed", seed]
        return rwkv("generate", "--batch", file, "-m", byte_model, "--ignore-eos", *fixed, *args, **kwargs)

    return run


@pytest.fixture
def alone(rwkv: Run, byte_model: Path) -> Callable[..., Any]:
    """Run rwkv generate --json on one prompt."""

    def run(prompt: str, *args: object, seed: int = 3) -> Any:
        common = ["-m", byte_model, "--ignore-eos", "--seed", seed]
        return json.loads(rwkv("generate", "--json", *common, *args, "--", prompt).stdout)

    return run


@pytest.mark.parametrize("size", [1, 3, 20])
def test_each_gets_the_text_that_it_gets_alone(
    batch: Run, alone: Any, prompts: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = {i: alone(prompt, "-n", 7 * i - 2) for i, prompt in enumerate(PROMPTS, 1)}
    monkeypatch.setattr("rwkv_cli.kernels.cpu.backend.chunk", 12)
    result = batch(prompts, "--batch-size", size)
    got = answers(result.stdout)
    assert got.keys() == want.keys()
    for key, record in got.items():
        for field in ("prompt", "text", "stop", "seed", "prompt_tokens", "tokens"):
            assert record[field] == want[key][field]
    assert f"{len(PROMPTS)} prompts answered; {sum(r['tokens'] for r in got.values())} tokens" in result.stderr
    assert result.stdout.isascii()


def test_stop_texts_seeds_and_lengths_by_line(batch: Run, alone: Any, tmp_path: Path) -> None:
    whole = alone("Once", "-n", 30)["text"]

    def there(at: int) -> str:
        """Two characters that the text has at `at` or soon after, but not before."""
        return next(whole[i : i + 2] for i in range(at, len(whole)) if whole.find(whole[i : i + 2]) == i)

    common = ("-n", 30, "--stop", there(14))
    lines = [
        {"id": "plain", "prompt": "Once"},
        {"id": "stop", "prompt": "Once", "stop": there(9)},
        {"id": "stops", "prompt": "Once", "stop": ["never there", there(5)]},
        {"id": "none", "prompt": "Once", "stop": [], "note": "not ours"},
        {"id": "short", "prompt": "Once", "max_tokens": 4},
        {"id": "seed", "prompt": "Once", "seed": 8},
        {"id": 0, "prompt": "Once", "seed": None},
    ]
    got = answers(batch(jsonl(tmp_path / "in", lines), *common).stdout)
    for key, stop in [("plain", there(14)), ("stop", there(9)), ("stops", there(5))]:
        assert (got[key]["text"], got[key]["stop"]) == (whole[: whole.index(stop)], "stop")
    assert (got["none"]["text"], got["none"]["stop"]) == (whole, "length")
    assert (got["short"]["text"], got["short"]["tokens"]) == (alone("Once", *common, "-n", 4)["text"], 4)
    assert got["seed"]["text"] == alone("Once", *common, seed=8)["text"]
    assert got[0]["text"] == alone("Once", *common, seed=got[0]["seed"])["text"]


def test_a_tuned_state_is_where_each_begins(batch: Run, alone: Any, prompts: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    tuned = {f"blocks.{i}.att.time_state": rng.standard_normal((3, 16, 16)).astype(np.float32) for i in range(3)}
    state = tiny.write_pth(tmp_path / "state.pth", tuned, "F32")
    want = {i: alone(prompt, "-n", 7 * i - 2, "--state", state)["text"] for i, prompt in enumerate(PROMPTS, 1)}
    got = answers(batch(prompts, "--state", state, "-o", tmp_path / "out").stdout + (tmp_path / "out").read_text())
    assert {key: record["text"] for key, record in got.items()} == want
    refused(batch(prompts, "-o", tmp_path / "out"), "line 1: id 1 was answered by another model or with other settings")


def test_states_are_as_if_alone(byte_model: Path) -> None:
    model = rwkv_cli.load(byte_model)
    cases: list[Any] = [(b"Once", 25), (b"x" * 30, 3), ("é".encode(), 9), (b"ab", 1), (b"The cat", 40)]

    def begun(request: Request) -> Completion:
        return Completion(model, model.new_state(), Sampler(Sampling(), 5), request)

    want = []
    for prompt, n in cases:
        text = "".join(begun(Request(list(prompt), n, ignore_eos=True)).stream())
        # ends most of them early, where the state has read a part of it and is taken back
        stop = text[len(text) // 2 :][:3] if n > 5 else "never"
        want.append(begun(Request(list(prompt), n, (stop,), ignore_eos=True)))
        assert "".join(want[-1].stream()) == want[-1].result.text
    assert [one.result.stop for one in want] == ["stop", "length", "stop", "length", "stop"]
    together, got = Batch(model), [begun(one.request) for one in want]
    for one in got:
        together.add(one)
    states: dict[Completion, Any] = {}
    while len(states) < len(got):
        states |= {one: one.state.clone() for one in together.step()}
    for a, b in zip(got, want, strict=True):
        for field in ("text", "unread", "unread_ids", "stop", "tokens", "prompt_tokens"):
            assert getattr(a.result, field) == getattr(b.result, field)
        for name, array in b.state.arrays().items():
            np.testing.assert_array_equal(states[a].arrays()[name], array)


def test_a_file_goes_on_after_its_whole_lines(batch: Run, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert batch(prompts, "-o", out).stdout == ""
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert answers(out) == answers(batch(prompts).stdout)
    assert "7 prompts answered, 7 of them before; 0 tokens" in batch(prompts, "-o", out).stderr
    assert out.read_bytes() == whole
    first, second = len(lines[0]), len(lines[0] + lines[1])
    for cut, kept in [
        (0, 0),
        (4, 0),
        (first - 1, 0),
        (first, 1),
        (first + 1, 1),
        (second + 60, 2),
        (len(whole) - 1, 6),
    ]:
        out.write_bytes(whole[:cut])
        result = batch(prompts, "-o", out, "--batch-size", 3)
        assert result.exit_code == 0
        assert f", {kept} of them before" in result.stderr or not kept
        assert out.read_bytes().startswith(b"".join(lines[:kept]))
        assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_seeds_that_were_not_given_need_not_be_the_same(batch: Run, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    batch(prompts, "-o", out, seed=None)
    before = answers(out)
    assert len({record["seed"] for record in before.values()}) > 1
    out.write_bytes(out.read_bytes()[:-30])
    assert batch(prompts, "-o", out, seed=None).exit_code == 0
    same = [key for key, record in answers(out).items() if record == before[key]]
    assert len(same) == len(PROMPTS) - 1


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_run_that_was_stopped_goes_on(
    batch: Run, byte_model: Path, prompts: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert batch(prompts, "-o", whole).exit_code == 0
    passes = iter(range(100))
    if how == "kill":
        script = f"""
            import itertools, os, signal, sys
            from rwkv_cli.engine.batch import Batch
            from rwkv_cli.main import main
            step, passes = Batch.step, itertools.count()
            Batch.step = lambda self: os.kill(os.getpid(), signal.SIGKILL) if next(passes) == 30 else step(self)
            sys.argv[1:] = {["generate", "--batch", str(prompts), "-m", str(byte_model), "-o", str(out)]}
            sys.argv += ["--ignore-eos", "--seed", "3", "--batch-size", "3"]
            main()
        """.replace("\n            ", "\n")
        done = subprocess.run([sys.executable, "-P", "-c", script], env=ENVIRONMENT, check=False)
        assert done.returncode == -signal.SIGKILL
    else:
        step = Batch.step

        def interrupted(self: Batch) -> list[Completion]:
            if next(passes) == 30:
                raise KeyboardInterrupt
            return step(self)

        with monkeypatch.context() as patch:
            patch.setattr(Batch, "step", interrupted)
            result = batch(prompts, "-o", out, "--batch-size", 3)
        assert result.exit_code == 1
        assert result.stderr.endswith("3 of 7 prompts are answered; the same command does the rest\nAborted!\n")
    assert len(answers(out)) == 3
    assert batch(prompts, "-o", out).exit_code == 0
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())


def test_a_grown_file_needs_its_new_prompts_only(batch: Run, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    batch(prompts, "-o", out)
    before = out.read_bytes()
    with prompts.open("a") as file:
        file.write('\n{"prompt": "one more"}')
    assert "8 prompts answered, 7 of them before" in batch(prompts, "-o", out).stderr
    assert out.read_bytes().startswith(before)
    assert answers(out)[len(PROMPTS) + 2]["prompt"] == "one more"


def test_answers_of_another_run_are_left_alone(
    batch: Run, prompts: Path, tmp_path: Path, rwkv: Run, converted: Any
) -> None:
    out = tmp_path / "out"
    batch(prompts, "-o", out, "--batch-size", 1)
    whole = out.read_bytes()
    for other in (("--temperature", 0.5), ("--stop", "x"), ("--seed", 4)):
        refused(batch(prompts, "-o", out, *other), f"{out} line 1: id 1 was answered .* other settings; give --output")
    for model in (converted("6", vocab=256), converted("7", "none", vocab=256)):
        again = rwkv("generate", "--batch", prompts, "-o", out, "-m", model, "--ignore-eos", "--seed", 3)
        refused(again, f"{out} line 1: id 1 was answered by another model")
    lines = [{"prompt": prompt, "max_tokens": 5 + 7 * i} for i, prompt in enumerate(PROMPTS)]
    lines[1]["prompt"] = "b"
    refused(batch(jsonl(tmp_path / "other", lines), "-o", out), f"{out} line 2: answers another prompt with id 2")
    refused(batch(jsonl(tmp_path / "fewer", lines[:1]), "-o", out), f"{out} line 2: answers another prompt with id 2")
    lines[0]["max_tokens"] = 6
    refused(batch(jsonl(tmp_path / "other", lines), "-o", out), f"{out} line 1: id 1 was answered")
    assert out.read_bytes() == whole
    for content in (
        '{"id": 1}\n',
        '{"id": 7, "name": "my precious data"}',
        '{"id": 7, "na',
        '{"id": 1, "prompt": "a", "text": "',  # the beginning of an answer to another prompt
        "notes",
        " ",
        "[" * 100_000 + "\n",
        '{"id": [1], "prompt": "a", "digest": ""}\n',
        "1\n",
    ):
        out.write_text(content)
        refused(batch(prompts, "-o", out), f"{out} line 1: not an answer of --batch; give --output another file")
        assert out.read_text() == content
    out.write_text("{")  # what a torn first line may be
    assert batch(prompts, "-o", out, "--batch-size", 1).exit_code == 0
    assert out.read_bytes() == whole
    out.write_bytes(whole[:-1].replace(b'"tokens"', b'"Tokens"'))
    assert ", 6 of them before" in batch(prompts, "-o", out, "--batch-size", 1).stderr
    assert out.read_bytes() == whole.replace(b'"tokens"', b'"Tokens"', 6)


def test_the_prompts_are_never_written_over(batch: Run, tmp_path: Path) -> None:
    for content in ('{"id": 1, "prompt": "Once"}', '\n{"prompt": "Once"}\n'):
        (tmp_path / "in").write_text(content)
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("in")
        for out in (tmp_path / "in", tmp_path / "link"):
            refused(batch(tmp_path / "in", "-o", out), f"{out}: holds the prompts themselves; give --output another")
        assert (tmp_path / "in").read_text() == content


def test_one_run_at_a_time_writes_a_file(batch: Run, prompts: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")
    out = tmp_path / "out"
    with out.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(batch(prompts, "-o", out), f"{out}: another run is writing its answers there; wait for its end, or")
        assert out.read_bytes() == b""
    assert batch(prompts, "-o", out).exit_code == 0
    with out.open("ab") as other:  # it has let go
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert len(answers(out)) == len(PROMPTS)


def test_a_run_holds_its_file(batch: Run, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")
    step, free = Batch.step, []

    def look(self: Batch) -> list[Completion]:
        with (tmp_path / "out").open("rb") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
                free.append(self)
            except BlockingIOError:
                pass
        return step(self)

    monkeypatch.setattr(Batch, "step", look)
    assert batch(prompts, "-o", tmp_path / "out").exit_code == 0
    assert not free


def test_answers_go_where_a_link_leads(batch: Run, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    assert batch(prompts, "-o", tmp_path / "link").exit_code == 0
    assert (tmp_path / "link").is_symlink()
    assert len(answers(tmp_path / "out")) == len(PROMPTS)


def test_names_cannot_steer_the_terminal(batch: Run, prompts: Path, tmp_path: Path) -> None:
    name = tmp_path / "\x1b[31m"
    name.write_text("notes")
    refused(batch(name), "�\\[31m line 1: not JSON")
    refused(batch(prompts, "-o", name), "�\\[31m line 1: not an answer")
    refused(batch(name, "-o", name), "�\\[31m: holds the prompts")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "not JSON (Expecting property name enclosed in double quotes, column 2)"),
        (b"once upon", "not JSON (Expecting value, column 1)"),
        (b"\xff", "can't decode byte 0xff"),
        (b"[" * 100_000, "recursion"),
        (b'["a"]', 'not an object like {"prompt": "Once upon a time"}'),
        (b"{}", 'its "prompt" must be a text that is not empty'),
        (b'{"prompt": ""}', 'its "prompt" must be a text that is not empty'),
        (b'{"prompt": 5}', 'its "prompt" must be a text that is not empty'),
        (b'{"prompt": "a", "id": "x"}', "its id 'x' is that of line 1"),
        (b'{"prompt": "a", "id": 1.5}', 'its "id" must be a text or a whole number'),
        (b'{"prompt": "a", "id": true}', 'its "id" must be a text or a whole number'),
        (b'{"prompt": "a", "max_tokens": 0}', 'its "max_tokens" must be a whole number from 1'),
        (b'{"prompt": "a", "max_tokens": null}', 'its "max_tokens" must be a whole number from 1'),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "line 3: a number in it has 5000 digits, which is too long"),
        (b'{"prompt": "a", "seed": -1}', 'its "seed" must be a whole number from 0'),
        (b'{"prompt": "a", "seed": "1"}', 'its "seed" must be a whole number from 0'),
        (b'{"prompt": "a", "stop": ""}', 'its "stop" must be a text or a list of texts, none of them empty'),
        (b'{"prompt": "a", "stop": ["a", 1]}', 'its "stop" must be a text or a list of texts, none of them empty'),
        (b'{"prompt": "a", "stop": {}}', 'its "stop" must be a text or a list of texts, none of them empty'),
        (b'{"prompt": "a", "temperature": 1, "top_p": 1}', '"temperature" is the same for all prompts: give it as an'),
        (b'{"prompt": "\\ud83d"}', "its prompt is not a text: character 0 is half a surrogate pair"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line_is_said_before_anything_is_made(
    batch: Run, tmp_path: Path, line: bytes, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batch, "step", lambda _: pytest.fail("a pass"))
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "good", "id": "x"}\r\n\r\n' + line + b"\n")
    result = batch(file, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith(f"Error: {file} line 3: ")
    assert says in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_the_files_is_said(batch: Run, prompts: Path, tmp_path: Path) -> None:
    refused(batch(tmp_path / "missing"), f"{tmp_path / 'missing'}: No such file or directory")
    refused(batch(tmp_path), f"{tmp_path}: Is a directory")
    refused(batch(jsonl(tmp_path / "empty", [])), f"{tmp_path / 'empty'}: holds no prompts")
    refused(batch(prompts, "-o", tmp_path / "no" / "out"), f"{tmp_path / 'no' / 'out'}: No such file or directory")
    refused(batch(prompts, "-o", tmp_path), f"{tmp_path}: Is a directory")
    if Path("/dev/full").exists():
        refused(batch(prompts, "-o", "/dev/full"), "/dev/full: No space left on device")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--batch", "f", "prompt"), "'[PROMPT]' does not go with --batch"),
        (("--batch", "f", "--json"), "'--json' does not go with --batch"),
        (("--batch", "f", "--stop", ""), "--stop: an empty text would end at once"),
        (("--batch", "f", "--batch-size", "0"), "'--batch-size'"),
        (("prompt", "-o", "f"), "'-o' / '--output' goes with --batch only"),
        (("prompt", "--batch-size", "2"), "'--batch-size' goes with --batch only"),
    ],
)
def test_options_that_do_not_go_together(rwkv: Run, byte_model: Path, args: tuple[str, ...], says: str) -> None:
    result = rwkv("generate", *args, "-m", byte_model)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr


def test_prompts_from_standard_input(batch: Run, prompts: Path) -> None:
    assert answers(batch("-", input=prompts.read_bytes()).stdout) == answers(batch(prompts).stdout)
    refused(batch("-", input=b"x"), "standard input line 1: not JSON")
