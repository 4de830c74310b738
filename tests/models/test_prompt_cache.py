"""How a prompt is read: in parts, with a bar, and not again where its state is in a cache."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import Result
from extras import needs
from safetensors.numpy import load_file, save_file
from states import damaged, read, tuned_tensors
from tiny import facts, wrong

import rwkv_cli
from rwkv_cli.engine.completion import Completion, Request
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.models import State
from rwkv_cli.terminal import output as terminal

Run = Callable[..., Result]
Convert = Callable[..., Path]
LONG = "Once upon a time there was a fox. " * 20


@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("quant", ["int8", "q4", "none"])
def test_a_token_gets_the_same_bits_wherever_a_prompt_is_cut(converted: Convert, version: str, quant: str) -> None:
    """Prompt caches and resumed texts rely on this."""
    model = rwkv_cli.load(converted(version, quant))
    ids = np.random.default_rng(3).integers(0, 300, 290)
    want, end = model.forward(ids)
    for cut in (1, 2, 37, 255, 289):
        _, state = model.forward(ids[:cut])
        got, after = model.forward(ids[cut:], state)
        np.testing.assert_array_equal(got, want)
        for name, array in after.arrays().items():
            np.testing.assert_array_equal(array, end.arrays()[name])


@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("quant", ["int8", "none"])
def test_reading_ahead_gives_the_bits_of_reading_one_by_one(converted: Convert, version: str, quant: str) -> None:
    model = rwkv_cli.load(converted(version, quant))
    _, begin = model.forward([1, 2, 3])
    snapshots = model.new_snapshots(8)
    for count in (1, 2, 7, 8):
        ids, state, alone = np.random.default_rng(count).integers(0, 300, count), begin.clone(), begin.clone()
        logits = model.read_ahead(ids, state, snapshots)
        for t, token in enumerate(ids):
            np.testing.assert_array_equal(logits[t], model.advance([token], alone))
            between = snapshots.after(t) if t < count - 1 else state
            for name, array in between.arrays().items():
                np.testing.assert_array_equal(array, alone.arrays()[name])
    with pytest.raises(ValueError, match="room for 8 ids, not for 9"):
        model.read_ahead([0] * 9, begin, snapshots)


@pytest.mark.parametrize("version", ["4", "6", "7"])
def test_a_prompt_in_the_cache_is_not_read_again(
    generate: Run, converted: Convert, tmp_path: Path, version: str
) -> None:
    model, cache = converted(version, vocab=256), ("--prompt-cache", tmp_path / "cache")
    size = len(LONG)

    def run(prompt: str, *args: object) -> tuple[int, int, str]:
        found = facts(generate(prompt, "-n", 12, "--json", *args, model=model))
        return found["cached_tokens"], found["prompt_tokens"], found["text"]

    text = run(LONG)[2]
    assert run(LONG, *cache) == (0, size, text)
    written = (tmp_path / "cache").read_bytes()
    assert run(LONG, *cache) == (size - 1, 1, text)
    longer = run(LONG + "The end")
    assert longer[:2] == (0, size + 7)
    assert run(LONG + "The end", *cache) == (size - 1, 8, longer[2])
    assert (tmp_path / "cache").read_bytes() == written
    result = generate(LONG, "-n", 12, *cache, model=model)
    assert (result.stdout, result.stderr) == (text, "")


def test_a_cache_of_something_else_is_written_anew(generate: Run, converted: Convert, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    models = [converted("7", vocab=256), converted("7", "none", vocab=256), converted("7", vocab=256, seed=1),
              converted("6", vocab=256)]  # fmt: skip
    tiny.write_pth(tmp_path / "tuned.pth", tuned_tensors())
    read(models[0]).save(tmp_path / "saved")
    runs = [
        ("one prompt", models[0], ()),
        ("another prompt", models[0], ()),
        ("another", models[0], ()),  # the beginning of a prompt cannot be taken from what comes after it
        ("another", models[1], ()),
        ("another", models[2], ()),
        ("another", models[3], ()),
        ("another", models[0], ("--state", tmp_path / "tuned.pth")),
        ("another", models[0], ("--load-state", tmp_path / "saved")),
    ]
    for i, (prompt, model, args) in enumerate(runs):
        args = (prompt, "-n", 9, "--json", *args)
        plain = facts(generate(*args, model=model))
        result = generate(*args, "--prompt-cache", path, model=model)
        found = facts(result)
        assert (found["cached_tokens"], found["prompt_tokens"]) == (0, len(prompt))
        assert found["text"] == plain["text"]
        says = f"{path}: of another prompt, model or initial state; the prompt is read from its beginning\n"
        assert result.stderr == (says if i else "")
        again = generate(*args, "--prompt-cache", path, model=model)
        assert (facts(again)["cached_tokens"], facts(again)["text"]) == (len(prompt) - 1, plain["text"])


def test_a_damaged_cache_is_written_anew(generate: Run, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    args = ("Once", "-n", 3, "--prompt-cache", path)
    text = generate(*args).stdout
    metadata, arrays = State.read_metadata(path), load_file(path)

    def is_good() -> None:
        assert State.read_metadata(path) == metadata
        for name, array in load_file(path).items():
            np.testing.assert_array_equal(array, arrays[name])

    damaged(path, "nan")
    result = generate(*args)
    says = f"{path}: wkv holds NaN or infinity; the file is damaged, make it again; the prompt is read from"
    assert result.stdout == text
    assert result.stderr.startswith(says)
    is_good()
    for change in ({"tokens": "-1"}, {"tokens": "x"}, {"tokens": "9" * 9}, {"prompt_cache": ""}):
        save_file(arrays, path, metadata | change)
        assert generate(*args).stdout == text
        is_good()
    damaged(path, "truncated")
    wrong(generate(*args), f"{path} is there and is not a prompt cache; remove it, or give another file")


def test_a_prompt_of_one_token_needs_no_cache(generate: Run, tmp_path: Path) -> None:
    assert generate("O", "-n", 3, "--prompt-cache", tmp_path / "cache").stdout == generate("O", "-n", 3).stdout
    assert not list(tmp_path.iterdir())


def test_reading_is_followed_and_can_pause_anywhere(byte_model: Path) -> None:
    model = rwkv_cli.load(byte_model)
    ids = list(LONG.encode())[:600]
    texts = set()
    for ahead, want in [(0, [252, 504, 600]), (599, [252, 504, 599, 600]), (30, [30, 282, 534, 600])]:
        seen: list[int] = []
        completion = Completion(model, model.new_state(), Sampler(Sampling(), 0), Request(ids, 9))
        completion.read(ahead, seen.append)
        assert seen == sorted(seen)
        assert set(seen) & set(want) == {read for read in want if read <= ahead}
        assert completion.result.prompt_tokens == ahead
        np.testing.assert_array_equal(
            completion.state.wkv, model.forward(ids[:ahead])[1].wkv if ahead else model.new_state().wkv
        )
        texts.add("".join(completion.stream(seen.append)))
        assert seen == sorted(seen)
        assert set(seen) >= set(want)  # the ends of passes, beside what is told within them
        assert seen[-1] == 600
        assert completion.result.prompt_tokens == 600
    assert len(texts) == 1

    seen: list[int] = []

    def stop(read: int) -> None:
        seen.append(read)
        if read >= 300:
            completion.cancel()

    completion = Completion(model, model.new_state(), Sampler(Sampling(), 0), Request(ids, 1))
    assert list(completion.stream(stop)) == []
    assert (completion.result.prompt_tokens, completion.result.stop) in [(252, "interrupted"), (504, "interrupted")]
    assert seen[-2] < 300 <= seen[-1] < len(ids)
    np.testing.assert_array_equal(completion.state.wkv, model.forward(ids[: completion.result.prompt_tokens])[1].wkv)
    assert completion.result.prompt_seconds > 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize(("first", "shown"), [(1.5, True), (0, False)])
def test_a_bar_is_shown_before_the_first_part_is_read(
    monkeypatch: pytest.MonkeyPatch, first: float, shown: bool
) -> None:
    pexpect = needs("pexpect", "dev")
    code = (
        "import time\nfrom rwkv_cli.terminal import output as terminal\n"
        "with terminal.reading_bar(2560) as show:\n"
        f"    time.sleep({first})\n"
        "    show(256)\n    time.sleep(0.3)\n    show(2560)\n    print('text')\n"
    )
    monkeypatch.setenv("TERM", "xterm")
    done = pexpect.run(f'{sys.executable} -c "{code}"', encoding="utf-8", dimensions=(24, 100))
    before = done.split("text")[0]
    assert ("0/2560" in before and "256/2560" in before) == shown
    assert shown or done == "text\r\n"


def test_a_bar_is_not_shown_in_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_PATIENCE", 0)
    with terminal.reading_bar(10) as show:
        show(5)
        show(10)
    assert capsys.readouterr() == ("", "")
