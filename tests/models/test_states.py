"""Saved states: what files hold, what is refused, and that a text goes on from one as if it had not been saved."""

import dataclasses
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import Result
from numpy.typing import NDArray
from states import damaged, read
from tiny import facts, wrong

import rwkv_cli
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.sampling import Sampler
from rwkv_cli.engine.saved import load_start
from rwkv_cli.errors import FormatError
from rwkv_cli.models import State

Run = Callable[..., Result]
Convert = Callable[..., Path]


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights write mostly what is no text; let them pick from the alphabet."""
    sample = Sampler.sample

    def only(self: Sampler, logits: NDArray[np.float32]) -> int:
        masked = np.full_like(logits, -50)
        masked[97:123] = logits[97:123]
        return sample(self, masked)

    monkeypatch.setattr(Sampler, "sample", only)


def left(folder: Path) -> set[str]:
    """Names of all files in a folder, hidden ones too."""
    return {path.name for path in folder.iterdir()}


def test_metadata_is_kept_beside_a_state(byte_model: Path, tmp_path: Path) -> None:
    model = rwkv_cli.load(byte_model)
    state = read(byte_model)
    state.save(str(tmp_path / "state"), {"unread": "text\n", "rwkv": "not this"})
    metadata = State.read_metadata(tmp_path / "state")
    assert metadata == {"unread": "text\n", "rwkv": "7", "digest": model.digest, "order": "key, value"}
    assert re.fullmatch("sha256:[0-9a-f]{64}", model.digest)
    for same in (State.load(str(tmp_path / "state"), model.new_state()), state.clone(), State.stack([state]).row(0)):
        assert same.digest == state.digest
        np.testing.assert_array_equal(same.wkv, state.wkv)


def test_conversions_of_one_checkpoint_share_states_and_others_do_not(
    rwkv: Run, converted: Convert, tmp_path: Path
) -> None:
    model = rwkv_cli.load(converted("7", vocab=256))
    model.new_state().save(tmp_path / "state")
    assert State.load(tmp_path / "state", rwkv_cli.load(converted("7", "none", vocab=256)).new_state())
    other = converted("7", vocab=256, seed=1)
    with pytest.raises(FormatError, match=f"^{tmp_path}/state: a state of another model of the same size; load it"):
        State.load(tmp_path / "state", rwkv_cli.load(other).new_state())
    wrong(rwkv("generate", "a", "-m", other, "--load-state", tmp_path / "state"), f"{tmp_path}/state: a state of anoth")
    unknown = dataclasses.replace(model.new_state(), digest="")
    unknown.save(tmp_path / "unknown")
    assert State.load(tmp_path / "unknown", rwkv_cli.load(other).new_state()).digest == rwkv_cli.load(other).digest
    assert State.load(tmp_path / "state", unknown)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("nan", "wkv holds NaN or infinity; the file is damaged"),
        ("inf", "wkv holds NaN or infinity; the file is damaged"),
        ("dtype", "wkv is ('F16', (3, 3, 16, 16)), the model's is ('F32', (3, 3, 16, 16)); it is a state of another"),
        ("shape", "att_shift is ('F32', (3, 47)), the model's is ('F32', (3, 48)); it is a state of another model"),
        ("version", "a state of RWKV-6, the model is RWKV-7"),
        ("missing", "not a saved state; give a file that --save-state wrote"),
        ("foreign", "not a saved state; give a file that --save-state wrote"),
        ("truncated", "not a saved state; give a file that --save-state wrote"),
        ("empty", "not a saved state; give a file that --save-state wrote"),
        ("ids", "what is kept beside the state is damaged; save it again"),
        ("counts", "what is kept beside the state is damaged; save it again"),
        ("seed", "what is kept beside the state is damaged; save it again"),
        ("random", "what is kept beside the state is damaged; save it again"),
        ("nowhere", "what is kept beside the state is damaged; save it again"),
        ("deep", "what is kept beside the state is damaged; save it again"),
    ],
)
def test_a_damaged_state_is_refused(generate: Run, byte_model: Path, tmp_path: Path, kind: str, says: str) -> None:
    read(byte_model).save(tmp_path / "state")
    damaged(tmp_path / "state", kind)
    wrong(generate("a", "--load-state", tmp_path / "state"), f"{tmp_path}/state: {says}")


def test_a_missing_state_is_refused(generate: Run, tmp_path: Path) -> None:
    wrong(generate("a", "--load-state", tmp_path / "none"), f"{tmp_path}/none: No such file or directory")
    wrong(generate("a", "--load-state", tmp_path), f"{tmp_path}: Is a directory")
    wrong(generate("a", "--state", tmp_path / "none"), f"{tmp_path}/none: No such file or directory")


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_what_was_there(
    generate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = tmp_path / "state"
    args = ("Once", "-n", 2, "--save-state", path)
    for before in (None, b"whole"):
        if before:
            assert generate(*args).exit_code == 0
            before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(*((os, "fsync") if function == "fsync" else (Path, "replace")), fail)
            result = generate(*args)
        assert result.exit_code == 1
        if isinstance(error, OSError):
            assert f"Error: {path}: No space left on device; nothing was written\n" in result.stderr
        assert left(tmp_path) == ({"state"} if before else set())
        assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("option", ["--save-state", "--prompt-cache"])
def test_no_other_file_is_overwritten(generate: Run, byte_model: Path, tmp_path: Path, option: str) -> None:
    kind = option.removeprefix("--").replace("-", " ").replace("save state", "saved state")
    (tmp_path / "text").write_text("mine")
    (tmp_path / "empty").touch()
    if option == "--save-state":
        assert generate("Once", "-n", 1, "--prompt-cache", tmp_path / "other").exit_code == 0
    else:
        read(byte_model).save(tmp_path / "other")
    for path in (tmp_path / "text", tmp_path / "empty", tmp_path / "other", tmp_path, byte_model):
        wrong(generate("Once", option, path), f"{path} is there and is not a {kind}; remove it, or give another file")
    wrong(generate("Once", option, tmp_path / "a" / "b"), f"{tmp_path}/a is not a folder; make it first, or give anoth")
    assert (tmp_path / "text").read_text() == "mine"
    assert left(tmp_path) == {"text", "empty", "other"}


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_a_text_goes_on_as_if_it_had_not_been_saved(
    generate: Run, converted: Convert, tmp_path: Path, version: str
) -> None:
    model, path = converted(version, vocab=256), tmp_path / "state"
    whole = generate("Once upon", "-n", 24, model=model).stdout
    assert len(whole) == 24
    text = generate("Once upon", "-n", 8, "--save-state", path, model=model).stdout
    for _ in range(2):  # into the same file
        text += generate("-n", 8, "--load-state", path, "--save-state", path, input="", model=model).stdout
    assert text == whole
    assert left(tmp_path) == {"state"}


@pytest.mark.usefixtures("letters")
def test_a_sampled_text_goes_on_as_if_it_had_not_been_saved(rwkv: Run, byte_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "state"

    def run(*args: object) -> Any:
        return facts(rwkv("generate", *args, "-m", byte_model, "--ignore-eos", "--json", input=""))

    whole = run("Once", "-n", 30, "--seed", 5)["text"]
    first = run("Once", "-n", 15, "--seed", 5, "--save-state", path)["text"]
    for _ in range(2):  # the file is as it was
        second = run("-n", 15, "--load-state", path)
        assert (first + second["text"], second["seed"]) == (whole, 5)
    other = run("-n", 15, "--load-state", path, "--seed", 5)
    assert other["text"] != second["text"]  # that seed's first numbers, not those that come next
    assert other == run("-n", 15, "--load-state", path, "--seed", 5) | {
        name: value for name, value in other.items() if name.endswith("per_second")
    }


@pytest.mark.parametrize("option", ["--save-state", "--prompt-cache"])
def test_a_link_is_kept_and_its_target_written(generate: Run, tmp_path: Path, option: str) -> None:
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder" / "state"
    link.symlink_to("folder/state")
    for _ in range(2):
        assert generate("Once", "-n", 2, option, link).exit_code == 0
        assert link.is_symlink()
        assert target.is_file()
        assert left(tmp_path / "folder") == {"state"}
        target.rename(tmp_path / "old")
    target.write_text("mine")
    wrong(generate("Once", option, link), f"{target} is there and is not a ")
    link.unlink()
    link.symlink_to("none/state")
    wrong(generate("Once", option, link), f"{tmp_path}/none is not a folder; make it first")


def test_names_cannot_steer_the_terminal(generate: Run, tmp_path: Path) -> None:
    name = tmp_path / "\x1b[31m"
    name.write_text("mine")
    for option in ("--save-state", "--prompt-cache", "--load-state"):
        wrong(generate("Once", option, name), f"{tmp_path}/�[31m")
        wrong(generate("Once", option, name / "a"), f"{tmp_path}/�[31m")
    name.unlink()
    generate("Once", "-n", 1, "--prompt-cache", name)
    assert generate("Twice", "-n", 1, "--prompt-cache", name).stderr.startswith(f"{tmp_path}/�[31m: of another prompt")


def test_a_text_cut_inside_a_character_goes_on_with_the_same_tokens(
    generate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picked: list[int] = []
    sample = Sampler.sample

    def record(self: Sampler, logits: NDArray[np.float32]) -> int:
        picked.append(sample(self, logits))
        return picked[-1]

    monkeypatch.setattr(Sampler, "sample", record)
    generate("Once", "-n", 12)
    whole = picked.copy()
    assert max(whole) > 127
    for n in range(1, 12):
        picked.clear()
        generate("Once", "-n", n, "--save-state", tmp_path / "state")
        generate("-n", 12 - n, "--load-state", tmp_path / "state", input="")
        assert picked == whole


@pytest.mark.usefixtures("letters")
def test_a_prompt_comes_after_the_saved_text(generate: Run, byte_model: Path, tmp_path: Path) -> None:
    first = generate("Once", "-n", 5, "--save-state", tmp_path / "state").stdout
    whole = json.loads(generate(f"Once{first} and", "-n", 9, "--presence-penalty", 0, "--frequency-penalty", 0,
                                "--json").stdout)  # fmt: skip
    facts = json.loads(generate(" and", "-n", 9, "--presence-penalty", 0, "--frequency-penalty", 0, "--json",
                                "--load-state", tmp_path / "state").stdout)  # fmt: skip
    assert (facts["text"], facts["prompt"], facts["prompt_tokens"]) == (whole["text"], " and", 5)
    # one that a program saved, whose unread text is text
    read(byte_model, b"On").save(tmp_path / "ours", {"unread": f"ce{first}"})
    facts = json.loads(generate(" and", "-n", 9, "--presence-penalty", 0, "--frequency-penalty", 0, "--json",
                                "--load-state", tmp_path / "ours").stdout)  # fmt: skip
    assert facts["text"] == whole["text"]


@pytest.mark.usefixtures("letters")
def test_a_stop_text_is_not_in_the_saved_state(generate: Run, tmp_path: Path) -> None:
    whole = generate("Once", "-n", 20).stdout
    at = next(i for i in range(3, 18) if whole.index(whole[i : i + 2]) == i)
    facts = json.loads(generate("Once", "-n", 20, "--stop", whole[at : at + 2], "--save-state", tmp_path / "state",
                                "--json").stdout)  # fmt: skip
    assert (facts["text"], facts["stop"]) == (whole[:at], "stop")
    after = generate(" and", "-n", 9, "--presence-penalty", 0, "--frequency-penalty", 0, "--load-state",
                     tmp_path / "state").stdout  # fmt: skip
    want = generate(f"Once{whole[:at]} and", "-n", 9, "--presence-penalty", 0, "--frequency-penalty", 0).stdout
    assert after == want


def test_a_text_that_is_read_to_its_end_needs_a_prompt(
    rwkv: Run, byte_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "sample", lambda *_: 0)
    path = tmp_path / "\x1b[31m"  # nor can its name steer the terminal
    assert rwkv("generate", "Once", "-m", byte_model, "--save-state", path).exit_code == 0
    result = rwkv("generate", "-m", byte_model, "--load-state", path, input="")
    wrong(result, f"the text in {tmp_path}/�[31m had come to its end", 2)
    assert rwkv("generate", "Go on", "-m", byte_model, "--load-state", path).exit_code == 0


def test_options_that_exclude_each_other(generate: Run, tmp_path: Path) -> None:
    wrong(generate("a", "--state", tmp_path / "a", "--load-state", tmp_path / "b"), "exclude each other", 2)
    (tmp_path / "link").symlink_to("a")
    for other in (tmp_path / "a", tmp_path / "link", os.path.relpath(tmp_path / "a")):
        wrong(generate("a", "--save-state", tmp_path / "a", "--prompt-cache", other), "name the same file", 2)
    assert left(tmp_path) == {"link"}


def test_states_of_python_programs(byte_model: Path, tmp_path: Path) -> None:
    model = rwkv_cli.load(byte_model)
    assert isinstance(model, LanguageModel)
    read(byte_model).save(tmp_path / "state", {"unread": "é"})
    start = load_start(tmp_path / "state", model)
    assert (start.ids, start.unread, start.counts) == ((), "é", {})
