"""rwkv eval against plain float64 computations from the model's logits, and against the reference's own figures."""

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from extras import needs
from naive import log_softmax
from tiny import refused

import rwkv_cli
from rwkv_cli.engine.generated import Recall, arithmetic
from rwkv_cli.engine.likelihood import Question, answer_questions, start_of_text
from rwkv_cli.engine.scoring import Mean
from rwkv_cli.engine.significance import mcnemar, student
from rwkv_cli.main import cli
from rwkv_cli.models import Model

Run = Callable[..., Result]
STORY = Path(__file__).parents[2] / "docs" / "story.txt"
WORDS = ["A cat sat on the mat", "It rained, and the street was wet é", "one two three", "x y"] * 5


def write(path: Path, *items: object) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def measured(result: Result) -> dict[str, Any]:
    """The figures of a command that printed one part."""
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    facts: dict[str, Any] = json.loads(line)
    return facts


@functools.cache
def load(path: Path) -> Any:
    """The model of a file, loaded once."""
    return rwkv_cli.load(path)


def plain(path: Path, context: str, ending: str) -> tuple[float, bool, int]:
    """NLL of an ending after a context, if it is the likeliest throughout, and its tokens, in one text from token 0."""
    model = load(path)
    before, after = [0, *model.text_tokenizer.encode(context)], model.text_tokenizer.encode(ending)
    logits, _ = model.forward(before + after, all_logits=True)
    rows = log_softmax(logits[len(before) - 1 : -1].astype(np.float64))
    return -sum(rows[range(len(after)), after]), bool((rows.argmax(1) == after).all()), len(after)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled storyteller in float."""
    path = tmp_path_factory.mktemp("story") / "model"
    source = Path(rwkv_cli.__file__).with_name("storyteller.pth")
    assert CliRunner().invoke(cli, ["convert", str(source), str(path), "--quant", "none"]).exit_code == 0
    return path


def test_lambada_is_that_of_the_reference(rwkv: Run, story: Path, tmp_path: Path) -> None:
    """The procedure of ChatRWKV's v2/benchmark.py with token 0, run with the package rwkv 0.8.32 in float32."""
    lines = [line for line in STORY.read_text(encoding="utf-8").splitlines() if " " in line]
    task = write(tmp_path / "task.jsonl", *({"text": line} for line in lines))
    facts = measured(rwkv("eval", task, "-m", story, "--json"))
    assert (facts["items"], facts["start_token"]) == (8, 0)
    assert facts["measures"]["accuracy"]["value"] == 0.5
    assert facts["measures"]["nll_word"]["value"] == pytest.approx(2.897040092875892, rel=1e-6)
    table = rwkv("eval", task, "-m", story)
    assert "perplexity a word   18.1204 ± 18.87" in table.stdout
    assert "Token 0 starts each text." in table.stderr


def test_the_last_words_figures_are_the_plain_ones(rwkv: Run, byte_model: Path, tmp_path: Path) -> None:
    task = write(tmp_path / "task.jsonl", *({"text": text} for text in WORDS))
    facts = measured(rwkv("eval", task, "-m", byte_model, "--json", "--limit", 19))
    want = [plain(byte_model, *re.split("(?= [^ ]*$)", text)) for text in WORDS[:19]]
    nll = np.array([one[0] for one in want])
    assert (facts["items"], facts["of"], facts["task"], facts["part"]) == (19, 19, str(task), "")
    assert facts["measures"]["nll_word"] == {
        "value": pytest.approx(nll.mean(), rel=1e-6),
        "stderr": pytest.approx(nll.std(ddof=1) / math.sqrt(19), rel=1e-5),
    }
    assert facts["measures"]["accuracy"]["value"] == np.mean([one[1] for one in want])


def test_choices_are_judged_by_sum_and_by_mean(rwkv: Run, byte_model: Path, tmp_path: Path) -> None:
    choices = [["no", "a long answer", "é"], ["abc", "d"], ["x", "yes it is", "zz", "www"]] * 7
    answers = [2, "d", 1] * 7
    items = [{"question": f"What is {i}?", "choices": c, "answer": a}
             for i, (c, a) in enumerate(zip(choices, answers, strict=True))]  # fmt: skip
    form = r"Q: {question}\nA:"
    facts = measured(rwkv("eval", write(tmp_path / "t.jsonl", *items), "-m", byte_model, "--json", "--prompt", form))
    by_sum, by_mean = [], []
    for i, (some, answer) in enumerate(zip(choices, answers, strict=True)):
        right = some.index(answer) if isinstance(answer, str) else answer
        found = [plain(byte_model, f"Q: What is {i}?\nA:", " " + choice) for choice in some]
        by_sum.append(min(range(len(some)), key=lambda k: found[k][0]) == right)
        by_mean.append(min(range(len(some)), key=lambda k: found[k][0] / found[k][2]) == right)
    values = {name: measure["value"] for name, measure in facts["measures"].items()}
    assert values == {"accuracy_sum": np.mean(by_sum), "accuracy_mean": np.mean(by_mean)}
    assert len({tuple(by_sum), tuple(by_mean)}) == 2


def test_an_ending_longer_than_a_pass_is_read_whole(byte_model: Path) -> None:
    model = rwkv_cli.load(byte_model)
    endings = [[7] * 300, [8], [9, 10]]
    ((found,),) = [list(some) for some in answer_questions(model, [Question([0, 5], endings)])]
    for ending, one in zip(endings, found, strict=True):
        logits, _ = model.forward([0, 5, *ending[:-1]], all_logits=True)
        rows = log_softmax(logits[1:].astype(np.float64))
        assert (one.nll, one.tokens) == (pytest.approx(-sum(rows[range(len(ending)), ending]), rel=1e-6), len(ending))


@pytest.mark.parametrize(("version", "tokenizer", "want"), [("4", "json", 5), ("7", "json", 0), ("4", "world", 0)])
def test_the_token_before_a_text_is_the_references(version: str, tokenizer: str, want: int) -> None:
    class Named:
        class config:  # noqa: N801 - stands for the attribute
            pass

        class text_tokenizer:  # noqa: N801
            kind = tokenizer

            @staticmethod
            def encode(text: str) -> list[int]:
                return {"\n": [5]}[text]

    Named.config.version = version  # type: ignore[attr-defined]
    assert start_of_text(Named) == want  # type: ignore[arg-type]


def test_exact_answers_are_what_the_model_writes(rwkv: Run, story: Path, tmp_path: Path) -> None:
    """Answers are found by a plain loop first. A third of the items wants something else."""
    model = rwkv_cli.load(story)
    items = []
    for i, name in enumerate(["Mia", "Tom", "Sue", "Ben", "Tim", "Lily"]):
        question, written = f'"I can help you," said {name}.', list[int]()
        logits, state = model.forward([0, *model.text_tokenizer.encode(f"{question} Then")])
        while "\n" not in model.text_tokenizer.decode(written) and logits.argmax() != 0 and len(written) < 200:
            written.append(int(logits.argmax()))
            logits, state = model.forward(written[-1:], state)
        text = model.text_tokenizer.decode(written).partition("\n")[0].strip()
        items.append({"question": question, "answer": "something else" if i % 3 == 0 else ["?", text]})
    task = write(tmp_path / "t.jsonl", *items)
    facts = measured(rwkv("eval", task, "-m", story, "--json", "--prompt", "{question} Then"))
    assert facts["items"] == 6
    assert facts["measures"]["accuracy"]["value"] == 4 / 6


def test_sums_are_right_and_come_from_the_seed() -> None:
    task = arithmetic(4, 30, seed=3)
    assert task.parts == {"1 digit": 30, "2 digits": 30, "3 digits": 30, "4 digits": 30}
    for exercise in task.exercises:
        *shown, asked = exercise.prompt.split("\n")
        assert len(shown) == 4
        assert asked not in [line[: len(asked)] for line in shown]
        for line in [*shown, asked + exercise.answers[0]]:
            a, operation, b, result = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", line).groups()  # type: ignore[union-attr]
            assert int(result) == (int(a) + int(b) if operation == "+" else int(a) - int(b))
            assert len(a) == len(b) == int(exercise.part.split()[0])
    assert task == arithmetic(4, 30, seed=3) != arithmetic(4, 30, seed=4)
    assert arithmetic(2, 5, seed=3).exercises == [e for e in arithmetic(4, 5, seed=3).exercises if e.part[0] in "12"]


def test_recall_asks_for_what_was_told_so_many_tokens_before(byte_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text is put together from what the model reads, and its figures are computed in one pass."""
    monkeypatch.setattr("rwkv_cli.engine.generated._NEAREST", 100)
    model = rwkv_cli.load(byte_model)
    read: list[list[list[int]]] = []
    advance = Model.advance_batch

    def watched(self: Model, ids: Sequence[Any], *args: Any, **options: Any) -> Any:
        read.append([list(part) for part in ids])
        return advance(self, ids, *args, **options)

    monkeypatch.setattr(Model, "advance_batch", watched)
    texts: list[list[int]] = [[], [], []]
    seen = []
    for step in Recall(300, 3, seed=5).run([model]):
        if not step.answers:
            if read[0][0][0] == 0:
                texts = [[], [], []]
            for passed in read:
                texts = [[*text, *ids] for text, ids in zip(texts, passed, strict=True)]
        else:
            part = step.answers[0].part
            seen.append(part)
            for b, answer in enumerate(step.answers):
                whole = bytes(texts[b] + read[0][b]).decode()
                told = re.match(r"\0The secret word of (\w+) is( \w+)\. Remember it\.\n", whole)
                if part == "never told":
                    assert told is None
                    continue
                assert told is not None
                asked = f"\nQuestion: What is the secret word of {told[1]}?\nAnswer: The secret word of {told[1]} is"
                assert whole.endswith(asked)
                between = len(whole) - len(told[0]) - len(asked)
                assert int(part.split()[0]) <= between < int(part.split()[0]) + 40
                nll, greedy, _ = plain(byte_model, whole[1:], told[2])
                assert answer.figures[0] == {"accuracy": greedy, "nll": pytest.approx(nll, rel=1e-5)}
        read.clear()
    assert seen == ["never told", "100 tokens", "200 tokens", "300 tokens"]


def test_a_comparison_is_that_of_the_same_items(rwkv: Run, story: Path, byte_model: Path, tmp_path: Path) -> None:
    """The models have different vocabularies: items are texts."""
    one, other = story, byte_model
    task = write(tmp_path / "task.jsonl", *({"text": text} for text in WORDS[:7]))
    (line,) = rwkv("eval", task, "-m", one, "--compare", other, "--json").stdout.splitlines()
    measure = json.loads(line)["measures"]["nll_word"]
    ours, others = ([plain(path, *re.split("(?= [^ ]*$)", text))[0] for text in WORDS[:7]] for path in (one, other))
    difference = np.subtract(ours, others)
    assert measure == {
        "value": pytest.approx(np.mean(ours), rel=1e-6),
        "stderr": pytest.approx(np.std(ours, ddof=1) / 7**0.5, rel=1e-5),
        "other": pytest.approx(np.mean(others), rel=1e-6),
        "difference": pytest.approx(difference.mean(), rel=1e-4),
        "difference_stderr": pytest.approx(difference.std(ddof=1) / 7**0.5, rel=1e-4),
        "p": measure["p"],
    }
    same = rwkv("eval", task, "-m", one, "--compare", one)
    assert re.search(r"accuracy .* \+0\.00 ± 0\.00 %  +1\.0000\n", same.stdout)


def test_probabilities_are_those_of_the_tables() -> None:
    """Student's t from printed tables, on both sides; McNemar's from the binomial distribution."""
    for count, t, p in ((2, 12.706, 0.05), (3, 4.303, 0.05), (6, 2.571, 0.05), (31, 2.750, 0.01), (1001, 2.581, 0.01)):
        assert student(Mean(count, t, (count - 1.0) * count)) == pytest.approx(p, rel=1e-3)
    assert student(Mean(1, 3.0)) != student(Mean(1, 3.0))
    assert (student(Mean(4, 0.0)), student(Mean(4, 1.0))) == (1, 0)
    assert (mcnemar(1, 9), mcnemar(0, 0), mcnemar(5, 5)) == (pytest.approx(22 / 1024), 1, 1)
    assert mcnemar(3000, 2000) < 1e-40


def test_ctrl_c_keeps_what_was_measured(
    rwkv: Run, byte_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write(tmp_path / "task.jsonl", *({"text": text} for text in WORDS))
    whole = measured(rwkv("eval", task, "-m", byte_model, "--json", "--limit", 16))
    advance, calls = Model.advance_batch, []

    def interrupted(self: Model, ids: Sequence[Any], *args: Any, **options: Any) -> Any:
        calls.append(len(ids))
        if len(calls) >= 3:
            raise KeyboardInterrupt
        return advance(self, ids, *args, **options)

    monkeypatch.setattr(Model, "advance_batch", interrupted)
    result = rwkv("eval", task, "recall", "-m", byte_model, "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert facts == {**whole, "of": 20}
    assert "Stopped: the figures are those of 16 of 148 items." in result.stderr
    assert rwkv("eval", "recall", "-m", byte_model, "--plot", tmp_path / "none.svg").exit_code == 1
    assert not (tmp_path / "none.svg").exists()


def test_the_picture_has_both_models(rwkv: Run, byte_model: Path, tmp_path: Path) -> None:
    needs("matplotlib", "dev")
    options = ["--distance", 30, "--limit", 2, "--plot", tmp_path / "recall.svg"]
    assert rwkv("eval", "recall", "-m", byte_model, "--compare", byte_model, *options).exit_code == 0
    drawn = (tmp_path / "recall.svg").read_text(encoding="utf-8")
    for text in ("Recall of a word by distance", "2 texts a distance", "accuracy in %", "NLL in nats", "never told"):
        assert text in drawn


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"),
        ('"text"', "line 2: not an item of a task"),
        ('{"text": "word"}', 'line 2: its "text" must be a text of two words or more'),
        ('{"question": "", "answer": "1"}', 'line 2: its "question" must be a text that is not empty'),
        ('{"question": "?", "answer": ""}', 'line 2: its "answer" must be a text or a list of texts'),
        ('{"question": "?", "answer": 1, "choices": ["a"]}', 'line 2: its "choices" must be a list of 2 texts or more'),
        ('{"question": "?", "answer": 2, "choices": ["a", "b"]}', 'line 2: its "answer" must be one of its "choices"'),
        ('{"question": "?", "answer": true, "choices": ["a", "b"]}', 'line 2: its "answer" must be one of'),
        ('{"question": "?", "answer": 1, "choices": ["a", "b"]}', "line 2: is an item of another kind"),
        ('{"question": "?", "answer": "1"}', "line 2: is an item of another kind"),
    ],
)
def test_a_wrong_line_is_named(rwkv: Run, tmp_path: Path, line: str, says: str) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text('{"text": "two words"}\n' + line + "\n", encoding="utf-8")
    refused(rwkv("eval", task), re.escape(f"{task} {says}"))


def test_what_is_no_task_is_refused(rwkv: Run, tmp_path: Path) -> None:
    assert "'lambada' is no task: give arithmetic or recall, or a JSONL file" in rwkv("eval", "lambada").stderr
    assert "lacks {question}" in rwkv("eval", "arithmetic", "--prompt", "?").stderr
    assert "--plot draws recall" in rwkv("eval", "arithmetic", "--plot", tmp_path / "a.svg").stderr
    refused(rwkv("eval", tmp_path / "none.jsonl"), "none.jsonl: No such file")
    (tmp_path / "empty").write_text("\n")
    refused(rwkv("eval", tmp_path / "empty"), "empty: holds no items")
