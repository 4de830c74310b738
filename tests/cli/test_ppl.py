"""rwkv ppl against a plain float64 computation from the model's logits."""

import json
import math
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from click.testing import Result
from naive import log_softmax
from tiny import refused

import rwkv_cli
from rwkv_cli.engine import scoring
from rwkv_cli.engine.scoring import ByPosition, Mean, Quantile
from rwkv_cli.models import Model

Run = Callable[..., Result]
TEXT = ("It was a dark and stormy night; the rain fell in torrents, é 你好 👋.\n" * 9).encode()
KEYS = {"model", "file", "tokens", "bytes", "nll", "nll_stderr", "ppl", "ppl_stderr", "bits_per_byte", "context",
        "start_token", "tokens_per_second", "by_position"}  # fmt: skip
COMPARED = {"kl_mean", "kl_p999", "top1_agreement", "nll_diff", "nll_diff_stderr", "other_ppl", "other_by_position"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").write_bytes(TEXT)
    return tmp_path / "text"


def scored(path: Path, ids: list[int], context: int | None, start: int | None) -> tuple[np.ndarray, list[int]]:
    """log p [T, V] of each scored token of a text, and those tokens: each context is read anew, by itself."""
    model, rows, targets = rwkv_cli.load(path), [], []
    for at in range(0, len(ids), context or len(ids)):
        part = [*([] if start is None else [start]), *ids[at : at + (context or len(ids))]]
        if len(part) > 1:
            logits, _ = model.forward(part[:-1], all_logits=True)
            rows.append(log_softmax(logits.astype(np.float64)))
            targets += part[1:]
    return np.concatenate(rows), targets


@pytest.mark.parametrize("start", [0, 7, None])
@pytest.mark.parametrize(
    ("context", "limit"), [(None, None), (None, 300), (None, 1000), (100, None), (257, 600), (2, 31)]
)
def test_figures_are_the_plain_ones(
    rwkv: Run, byte_model: Path, text: Path, start: int | None, context: int | None, limit: int | None
) -> None:
    options = ["--start-token", "none" if start is None else start]
    options += ["--context", context] if context else []
    options += ["--limit", limit] if limit else []
    result = rwkv("ppl", text, "-m", byte_model, "--json", *options)
    facts = json.loads(result.stdout)
    assert set(facts) == KEYS
    p, targets = scored(byte_model, list(TEXT)[:limit], context, start)
    nll = -p[np.arange(len(targets)), targets]
    n = len(nll)
    assert (facts["tokens"], facts["bytes"], facts["context"], facts["start_token"]) == (n, n, context, start)
    want = {
        "nll": nll.mean(),
        "nll_stderr": nll.std(ddof=1) / math.sqrt(n),
        "ppl": math.exp(nll.mean()),
        "ppl_stderr": math.exp(nll.mean()) * nll.std(ddof=1) / math.sqrt(n),
        "bits_per_byte": nll.sum() / math.log(2) / n,
    }
    assert {key: facts[key] for key in want} == pytest.approx(want, rel=1e-6)
    assert facts["tokens_per_second"] > 0
    assert (facts["model"], facts["file"]) == (str(byte_model), str(text))


@pytest.mark.parametrize("start", [0, None])
@pytest.mark.parametrize(("context", "limit"), [(None, 300), (100, None), (64, 300), (2, 31), (3, 1 + 3)])
def test_figures_by_position_are_the_plain_ones(
    rwkv: Run, byte_model: Path, text: Path, start: int | None, context: int | None, limit: int | None
) -> None:
    options = ["--start-token", "none" if start is None else start]
    options += ["--context", context] if context else []
    options += ["--limit", limit] if limit else []
    facts = json.loads(rwkv("ppl", text, "-m", byte_model, "--json", "--compare", byte_model, *options).stdout)
    bins = facts["by_position"]
    assert bins == facts["other_by_position"]
    ids = list(TEXT)[:limit]
    p, targets = scored(byte_model, ids, context, start)
    nll = -p[np.arange(len(targets)), targets]
    positions = np.arange(len(ids)) % (context or len(ids)) + 1
    positions = positions[positions > (start is None)]
    assert bins[0][0] == positions.min()
    assert bins[-1][1] == positions.max()
    assert all(after[0] == before[1] + 1 for before, after in pairwise(bins))
    for first, last, tokens, mean, stderr in bins:
        inside = nll[(positions >= first) & (positions <= last)]
        assert last <= 1.5 * first
        assert (tokens, mean) == (len(inside), pytest.approx(inside.mean(), rel=1e-5))
        if tokens > 1:
            assert stderr == pytest.approx(inside.std(ddof=1) / math.sqrt(tokens), rel=1e-4)
        else:
            assert stderr is None
    assert sum(row[2] for row in bins) == facts["tokens"]
    assert sum(row[2] * row[3] for row in bins) / facts["tokens"] == pytest.approx(facts["nll"], rel=1e-9)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_state_is_carried_whatever_the_steps(
    rwkv: Run, byte_model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    want = json.loads(rwkv("ppl", text, "-m", byte_model, "--limit", 200, "--json").stdout)["nll"]
    monkeypatch.setattr("rwkv_cli.kernels.cpu.backend.chunk", chunk)
    monkeypatch.setattr(scoring, "_BLOCK", 50)
    got = json.loads(rwkv("ppl", text, "-m", byte_model, "--limit", 200, "--json").stdout)["nll"]
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("options", [(), ("--context", 33, "--start-token", "none"), ("--limit", 1)])
@pytest.mark.parametrize("seed", [0, 1])  # the same weights, and others
def test_a_comparison_is_the_plain_one(
    rwkv: Run, converted: Any, text: Path, options: tuple[object, ...], seed: int
) -> None:
    a, b = converted("7", vocab=256), converted("7", "none", vocab=256, seed=seed)
    facts = json.loads(rwkv("ppl", text, "-m", a, "--compare", b, "--json", *options).stdout)
    assert set(facts) == KEYS | COMPARED
    context, start = (33, None) if len(options) == 4 else (None, 0)
    ids = list(TEXT)[: 1 if "--limit" in options else None]
    (q, targets), (p, _) = scored(a, ids, context, start), scored(b, ids, context, start)
    kl = (np.exp(p) * (p - q)).sum(-1)
    diff = (p - q)[np.arange(len(targets)), targets]
    assert facts["kl_mean"] == pytest.approx(kl.mean(), rel=1e-3, abs=1e-9)
    assert facts["kl_p999"] == pytest.approx(np.sort(kl)[math.ceil(0.999 * len(kl)) - 1], rel=4e-3)
    assert facts["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert facts["nll_diff"] == pytest.approx(diff.mean(), rel=1e-3, abs=1e-7)
    if len(diff) > 1:
        assert facts["nll_diff_stderr"] == pytest.approx(diff.std(ddof=1) / math.sqrt(len(diff)), rel=1e-3)
        assert kl.mean() > 1e-7
    else:
        assert facts["nll_diff_stderr"] is facts["nll_stderr"] is None
    assert facts["other_ppl"] == pytest.approx(math.exp(-p[np.arange(len(targets)), targets].mean()), rel=1e-6)


def test_a_model_does_not_differ_from_itself(rwkv: Run, byte_model: Path, text: Path) -> None:
    facts = json.loads(rwkv("ppl", text, "-m", byte_model, "--compare", byte_model, "--json").stdout)
    want = {"kl_mean": 0, "kl_p999": 0, "top1_agreement": 1, "nll_diff": 0, "nll_diff_stderr": 0}
    assert {key: facts[key] for key in want} == pytest.approx(want, abs=1e-12)
    assert facts["kl_p999"] == 0
    assert facts["other_ppl"] == facts["ppl"]


def test_a_table_shows_the_same_figures(rwkv: Run, byte_model: Path, text: Path) -> None:
    facts = json.loads(rwkv("ppl", text, "-m", byte_model, "--context", 50, "--json").stdout)
    result = rwkv("ppl", text, text, "-m", byte_model, "--context", 50, "--compare", byte_model)
    each, _, total = result.stdout.partition("total  ")
    assert total.lstrip().startswith("2 files")
    rows = dict(line.split("  ", 1) for line in each.split("\n\n")[1].splitlines())
    rows = {key: value.strip() for key, value in rows.items()}
    assert rows["perplexity"] == f"{facts['ppl']:.4f} ± {facts['ppl_stderr']:.4f}"
    assert rows["NLL"] == f"{facts['nll']:.6f} ± {facts['nll_stderr']:.6f} nats per token"
    assert rows["tokens"] == f"{len(TEXT)} ({len(TEXT)} bytes), context 50 tokens, start token 0"
    assert rows["top-1"] == "100.000 % the same"
    assert each.count("perplexity  ") == 2


def test_each_file_is_scored_by_itself(rwkv: Run, byte_model: Path, tmp_path: Path, text: Path) -> None:
    other = tmp_path / "x{0} [b].txt"
    other.write_bytes(b"a")
    lines = rwkv("ppl", text, other, text, "-m", byte_model, "--limit", 40, "--json").stdout.splitlines()
    first, second, third = map(json.loads, lines)
    assert (first["file"], second["file"], second["tokens"], second["nll_stderr"]) == (str(text), str(other), 1, None)
    assert first["nll"] == third["nll"]


@pytest.fixture
def json_models(tmp_path: Path, converted: Any, rwkv: Run) -> list[Path]:
    """Two tiny models whose tokenizers take text only, with different tokens of two bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    for merge in (("I", "t"), ("a", "r")):
        tokens = ["<|endoftext|>", *alphabet, "".join(merge)]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, [merge]))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.save(str(tmp_path / "t.json"))
        command = "convert", converted().with_suffix(".pth"), tmp_path / merge[0], "--tokenizer", tmp_path / "t.json"
        assert rwkv(*command).exit_code == 0
    return [tmp_path / "I", tmp_path / "a"]


@pytest.mark.parametrize("start", ["0", "none"])
def test_a_text_for_a_json_tokenizer(rwkv: Run, json_models: list[Path], text: Path, start: str) -> None:
    facts = json.loads(rwkv("ppl", text, "-m", json_models[0], "--json", "--start-token", start).stdout)
    ids = rwkv_cli.load(json_models[0]).text_tokenizer.encode(TEXT)
    assert len(ids) == len(TEXT) - 9
    p, targets = scored(json_models[0], ids, None, None if start == "none" else 0)
    nll = -p[np.arange(len(targets)), targets]
    size = len(TEXT) - (2 if start == "none" else 0)  # without a start token, "It" is not scored
    assert (facts["tokens"], facts["bytes"]) == (len(targets), size)
    assert facts["nll"] == pytest.approx(nll.mean(), rel=1e-6)
    assert facts["bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / size, rel=1e-6)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("{missing}", "-m", "{byte}"), 1, "{missing}: No such file or directory"),
        (("{folder}", "-m", "{byte}"), 2, "'{folder}' is a directory"),
        (("-m", "{byte}"), 2, "Missing argument 'FILE...'"),
        (("{text}", "-m", "{none}"), 1, "{none}: has no tokenizer"),
        (("{text}", "-m", "{byte}", "--compare", "{missing}"), 1, "{missing}: No such file or directory"),
        (("{text}", "-m", "{byte}", "--compare", "{json}"), 1, "{byte} and {json} have different tokenizers"),
        (("{text}", "-m", "{json}", "--compare", "{other}"), 1, "{json} and {other} have different tokenizers"),
        (("{empty}", "-m", "{byte}"), 1, "{empty}: is empty, so there is nothing to score"),
        (("{empty}", "-m", "{json}"), 1, "{empty}: is empty, so there is nothing to score"),
        (("{one}", "-m", "{byte}", "--start-token", "none"), 1, "{one}: nothing to score, since without a start token"),
        (("{text}", "-m", "{byte}", "--start-token", "none", "--context", "1"), 1, "{text}: nothing to score"),
        (("{bad}", "-m", "{json}"), 1, "{bad}: not UTF-8 at byte 70;"),
        (("{text}", "-m", "{byte}", "--start-token", "256"), 2, "--start-token: 256 is outside the vocabulary of 256"),
        (("{text}", "-m", "{byte}", "--start-token", "-1"), 2, "'--start-token': '-1' is neither a token id nor none"),
        (("{text}", "-m", "{byte}", "--start-token", "NONE"), 2, "'NONE' is neither a token id nor none"),
        (("{text}", "-m", "{byte}", "--context", "0"), 2, "'--context'"),
        (("{text}", "-m", "{byte}", "--limit", "x"), 2, "'--limit'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence(
    rwkv: Run, byte_model: Path, converted: Any, json_models: list[Path], tmp_path: Path, text: Path,
    monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], code: int, says: str,
) -> None:  # fmt: skip
    names = {name: tmp_path / name for name in ("missing", "folder", "empty", "one", "bad")}
    names |= {"byte": byte_model, "json": json_models[0], "other": json_models[1], "none": converted(), "text": text}
    monkeypatch.setattr(scoring, "_BLOCK", 32)
    names["folder"].mkdir()
    names["empty"].touch()
    names["one"].write_bytes(b"a")
    names["bad"].write_bytes(b"abcd " * 14 + b"\xff")
    result = rwkv("ppl", *(arg.format(**names) for arg in args))
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert (result.exit_code, len(errors), result.stdout) == (code, 1, "")
    assert says.format(**names) in errors[0]


def test_output_that_is_not_finite_is_refused(
    rwkv: Run, byte_model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Model.losses

    def broken(self: Any, *args: Any, **options: Any) -> Any:
        nll = losses(self, *args, **options)
        nll[-1] = np.nan
        return nll

    monkeypatch.setattr(Model, "losses", broken)
    result = rwkv("ppl", text, "-m", byte_model)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{byte_model}: the model's output is not finite" in result.stderr


def test_a_file_is_read_a_block_at_a_time(byte_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a block more is taken than has been scored, and none after the limit."""
    monkeypatch.setattr(scoring, "_BLOCK", 1000)
    (tmp_path / "long").write_bytes(b"x" * 5000)
    model: Any = rwkv_cli.load(byte_model)
    took: list[tuple[int, int]] = []

    class Counting:
        def encode_blocks(self, blocks: Iterator[bytes]) -> Any:
            def watched() -> Iterator[bytes]:
                for block in blocks:
                    took.append((len(block), scorer.nll.count))
                    yield block

            return rwkv_cli.engine.tokenizer.ByteTokenizer().encode_blocks(watched())

    model.tokenizer = Counting()
    scorer = scoring.Scorer(model, start_token=0, limit=2500)
    assert scorer.score(tmp_path / "long", lambda *_: None).tokens == 2500
    assert took == [(1000, 0), (1000, 1000), (1000, 2000)]


@pytest.mark.parametrize("cuts", [[], [1], [1, 2, 3, 4, 5], [64, 65, 700], [999]])
def test_bins_do_not_depend_on_the_steps(cuts: list[int]) -> None:
    values = np.random.default_rng(1).exponential(2, 1000)
    whole, parts = ByPosition(), ByPosition()
    whole.add(1, values)
    for at, part in zip([0, *cuts], np.split(values, cuts), strict=True):
        parts.add(at + 1, part)
    ends = [b.last for b in whole.bins()]
    assert ends[:10] == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32]
    assert ends[-2:] == [724, 1000]
    for a, b in zip(whole.bins(), parts.bins(), strict=True):
        assert a == pytest.approx(b, rel=1e-12, nan_ok=True)


def test_means_and_quantiles() -> None:
    values = np.random.default_rng(0).lognormal(-9, 3, 5000)
    mean, quantile = Mean(), Quantile()
    for part in np.split(values, [0, 1, 2, 700, 4000]):
        mean.add(part)
        quantile.add(part)
    assert (mean.count, mean.mean) == (5000, pytest.approx(values.mean(), rel=1e-12))
    assert mean.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(5000), rel=1e-12)
    for share in (0.01, 0.5, 0.999, 1.0):
        assert quantile.at(share) == pytest.approx(np.sort(values)[math.ceil(share * 5000) - 1], rel=3e-3)


def test_one_token_has_no_standard_error(rwkv: Run, byte_model: Path, text: Path) -> None:
    shown = rwkv("ppl", text, "-m", byte_model, "--compare", byte_model, "--limit", 1).stdout
    assert "perplexity" in shown
    assert "nan" not in shown
    assert "±" not in shown


def test_several_files_have_a_total(rwkv: Run, byte_model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(TEXT[:50])
    files = [text, tmp_path / "short"]
    facts = [json.loads(line) for line in rwkv("ppl", *files, "-m", byte_model, "--json").stdout.splitlines()]
    assert len(facts) == 2
    nll = sum(f["nll"] * f["tokens"] for f in facts) / sum(f["tokens"] for f in facts)
    tables = rwkv("ppl", *files, "-m", byte_model).stdout.split("\n\n")
    assert [table.split()[0] for table in tables] == ["file", "file", "total"]
    shown = tables[-1]
    assert f"{math.exp(nll):.4f}" in shown
    assert f"{len(TEXT) + 50} ({len(TEXT) + 50} bytes)" in shown
    assert "total" not in rwkv("ppl", text, "-m", byte_model).stdout


def test_scores_are_kept_and_not_made_again(rwkv: Run, byte_model: Path, tmp_path: Path) -> None:
    texts, out = [tmp_path / f"text{i}" for i in range(3)], tmp_path / "scores"
    for i, text in enumerate(texts):
        text.write_text("It was a dark night." * (i + 1))
    common = ["ppl", *texts, "-m", byte_model, "--compare", byte_model, "--limit", 55]
    report = re.sub("speed .*", "", rwkv(*common).stdout)
    assert re.sub("speed .*", "", rwkv(*common, "-o", out).stdout) == report
    whole = out.read_bytes()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [record["file"] for record in records] == [str(text) for text in texts]
    assert set(records[0]) == KEYS | COMPARED | {"digest"}
    out.write_bytes(whole[: whole.index(b"\n") + 200])
    shown = rwkv(*common, "-o", out).stdout
    assert re.sub("speed .*", "", shown) == report
    assert out.read_bytes().startswith(whole[: whole.index(b"\n") + 1])
    size = out.stat().st_size
    assert rwkv(*common, "-o", out).stdout == shown
    assert out.stat().st_size == size
    texts[1].write_text("It was a dark fight.")
    assert rwkv("ppl", *texts, "-m", byte_model, "--limit", 55, "-o", out).exit_code == 0
    records = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert len(records) == 6
    assert len({record["digest"] for record in records}) == 6


def test_what_is_no_file_of_scores_is_left_alone(rwkv: Run, byte_model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rwkv("ppl", text, "-m", byte_model, "-o", out)
    good = out.read_text()
    wrong = [good.replace('"tokens": ', f'"tokens": {number}, "x": ') for number in ("Infinity", "NaN", "[]")]
    wrong.append(re.sub('"tokens_per_second": [0-9.]+', '"tokens_per_second": 0', good))
    for content in ("notes\n", '{"digest": "x"}\n', '{"model": "m", "fi', *wrong):
        out.write_text(content)
        refused(rwkv("ppl", text, "-m", byte_model, "-o", out), f"{out} line 1: not a score of rwkv ppl; give --output")
        assert out.read_text() == content
    result = rwkv("ppl", text, "-m", byte_model, "-o", text)
    assert result.exit_code == 2
    assert "is one of the texts; name another file" in result.stderr
    assert text.read_bytes() == TEXT


def test_a_stopped_run_says_how_far_it_came(
    rwkv: Run, byte_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, score = iter(range(9)), scoring.Scorer.score

    def interrupted(*args: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(scoring.Scorer, "score", interrupted)
    (tmp_path / "other").write_bytes(TEXT)
    result = rwkv("ppl", text, tmp_path / "other", "-m", byte_model, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.endswith("1 of 2 texts are scored; the same command does the rest\nAborted!\n")
