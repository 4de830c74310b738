"""Saved states, tuned initial states and prompt caches: what files hold, what is refused, and that nothing changes."""

import dataclasses
import errno
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner, Result
from naive import Naive, error_ratio
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import rwkv_cli
from rwkv_cli.engine.completion import Completion, Request
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.engine.saved import load_start
from rwkv_cli.errors import FormatError
from rwkv_cli.main import cli
from rwkv_cli.models import State
from rwkv_cli.models.tuned import read_tuned_state
from rwkv_cli.terminal import output as terminal

Run = Callable[..., Result]
Convert = Callable[..., Path]
GREEDY = ("--temperature", 0, "--ignore-eos")
TUNED_VERSIONS = tiny.VERSIONS[1:]
LONG = "Once upon a time there was a fox. " * 20


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights write mostly what is no text; let them pick from the alphabet."""
    sample = Sampler.sample

    def only(self: Sampler, logits: NDArray[np.float32]) -> int:
        masked = np.full_like(logits, -50)
        masked[97:123] = logits[97:123]
        return sample(self, masked)

    monkeypatch.setattr(Sampler, "sample", only)


@pytest.fixture
def generate(rwkv: Run, byte_model: Path) -> Run:
    """`rwkv generate` on a model over bytes, greedily and without an end."""

    def run(*args: object, model: Path = byte_model, **kwargs: Any) -> Result:
        return rwkv("generate", *args, "-m", model, *GREEDY, **kwargs)

    return run


def read(path: Path, text: bytes = b"Once") -> State:
    """The state of a model after a text."""
    return rwkv_cli.load(path).forward(list(text))[1]


def wrong(result: Result, says: str, code: int = 1) -> None:
    """One sentence on standard error, nothing on standard output."""
    assert (result.exit_code, result.stdout) == (code, "")
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert says in errors[0]


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


def damaged(path: Path, kind: str) -> None:
    """Spoil a saved state."""
    arrays, metadata = load_file(path), State.read_metadata(path)
    if kind in ("nan", "inf"):
        arrays["wkv"][0].flat[3] = float(kind)
    elif kind == "dtype":
        arrays["wkv"] = arrays["wkv"].astype(np.float16)
    elif kind == "shape":
        arrays["att_shift"] = arrays["att_shift"][:, :-1].copy()
    elif kind == "missing":
        del arrays["ffn_shift"]
    elif kind == "foreign":
        metadata = {}
    elif kind in ("ids", "counts", "deep", "seed", "random", "nowhere"):
        random = Sampler(Sampling(), 5).random
        good = {"ids": [], "counts": {}, "seed": 5, "random": random}
        bad: dict[str, dict[str, Any]] = {
            "ids": {"ids": [256]},
            "counts": {"counts": {"1": float("nan")}},
            "seed": {"seed": [5]},
            "random": {"random": random | {"state": {"state": 1.5, "inc": 1}}},
            "nowhere": {"random": random | {"state": {"state": 1 << 128, "inc": 1}}},
        }
        metadata["going_on"] = "[" * 10**5 if kind == "deep" else json.dumps(good | bad[kind])
    save_file(arrays, path, metadata)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "version":
        save_file(arrays, path, metadata | {"rwkv": "6"})


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


def tuned_tensors(version: str = "7", layers: int = 3, heads: int = 3, size: int = 16) -> tiny.Tensors:
    """A tuned state as official programs write it, [value, key]."""
    rng = np.random.default_rng(tiny.VERSIONS.index(version))
    return {
        f"blocks.{i}.att.time_state": rng.standard_normal((heads, size, size)).astype(np.float32)
        for i in range(layers)
    }  # fmt: skip


@pytest.mark.parametrize("version", TUNED_VERSIONS)
@pytest.mark.parametrize(("form", "dtype"), [("pth", "BF16"), ("pth", "F16"), ("safetensors", "F32")])
def test_a_tuned_state_is_the_one_merged_into_the_checkpoint(
    converted: Convert, version: str, form: str, dtype: str, tmp_path: Path
) -> None:
    tensors = tuned_tensors(version)
    write = tiny.write_pth if form == "pth" else tiny.write_safetensors
    write(tmp_path / "tuned", tensors, dtype)
    merged = tiny.weights(version) | tiny.rounded(tensors, dtype)
    source = tiny.write_pth(tmp_path / "merged.pth", merged, "F32")
    assert CliRunner().invoke(cli, ["convert", str(source), str(tmp_path / "merged")]).exit_code == 0
    want, _ = rwkv_cli.load(tmp_path / "merged").forward([5, 6, 7])
    model = rwkv_cli.load(converted(version))
    state = read_tuned_state(tmp_path / "tuned", model)
    assert state.digest == model.digest
    got, _ = model.forward([5, 6, 7], state)
    np.testing.assert_array_equal(got, want)
    assert not np.array_equal(got, model.forward([5, 6, 7])[0])


@pytest.mark.parametrize("version", TUNED_VERSIONS)
def test_a_tuned_state_has_values_by_rows_in_the_file(converted: Convert, version: str, tmp_path: Path) -> None:
    tensors = tuned_tensors(version)
    model = rwkv_cli.load(converted(version, "none"))
    state = read_tuned_state(tiny.write_pth(tmp_path / "tuned", tensors, "F32"), model)
    got, _ = model.forward([5, 6, 7], state, all_logits=True)
    assert error_ratio(got, Naive(version, tiny.weights(version) | tensors).forward([5, 6, 7])) < 1e-5


def test_generate_starts_from_a_tuned_state(generate: Run, tmp_path: Path) -> None:
    tiny.write_pth(tmp_path / "tuned.pth", tuned_tensors())
    first = generate("Once", "-n", 30)
    second = generate("Once", "-n", 30, "--state", tmp_path / "tuned.pth")
    assert second.exit_code == 0
    assert second.stdout != first.stdout


@pytest.mark.parametrize(
    ("version", "change", "says"),
    [
        ("4", {}, "RWKV-4 has no initial state to tune; RWKV-5 to RWKV-7 have"),
        ("7", {"layers": 2}, "tensor blocks.2.att.time_state is missing; a tuned initial state for this model holds"),
        ("7", {"layers": 4}, "tensor blocks.3.att.time_state is too much; a tuned initial state for this model holds"),
        ("6", {"heads": 2}, "tensor blocks.0.att.time_state has shape [2, 16, 16], the model's is [3, 16, 16]; it is"),
        ("5.2", {"size": 8}, "tensor blocks.0.att.time_state has shape [3, 8, 8], the model's is [3, 16, 16]; it is"),
        ("7", {"emb.weight": np.zeros((4, 4), np.float32)}, "tensor emb.weight is too much; a tuned initial state"),
        ("7", {"blocks.1.att.time_state": np.full((3, 16, 16), np.nan, np.float32)},
         "tensor blocks.1.att.time_state holds NaN or infinity; the file is damaged, download it again"),
        ("7", {"blocks.2.att.time_state": np.full((3, 16, 16), np.inf, np.float32)},
         "tensor blocks.2.att.time_state holds NaN or infinity; the file is damaged, download it again"),
    ],
)  # fmt: skip
def test_what_is_no_tuned_state_of_the_model_is_refused(
    generate: Run, converted: Convert, tmp_path: Path, version: str, change: dict[str, Any], says: str
) -> None:
    sizes = {name: value for name, value in change.items() if isinstance(value, int)}
    added = {name: value for name, value in change.items() if name not in sizes}
    path = tiny.write_pth(tmp_path / "tuned.pth", tuned_tensors(version, **sizes) | added, "F32")
    wrong(generate("a", "--state", path, model=converted(version, vocab=256)), f"{path}: {says}")


def test_files_of_another_kind_are_sent_to_their_option(generate: Run, byte_model: Path, tmp_path: Path) -> None:
    read(byte_model).save(tmp_path / "saved")
    generate("Once", "-n", 1, "--prompt-cache", tmp_path / "cache")
    tiny.write_pth(tmp_path / "tuned.pth", tuned_tensors())
    tiny.write_safetensors(tmp_path / "tuned.safetensors", tuned_tensors())
    for name, option, says in [
        ("saved", "--state", "a saved state, not a tuned initial one; rwkv generate --load-state takes it"),
        ("cache", "--load-state", "a prompt cache, not a saved state; give it with --prompt-cache"),
        ("tuned.pth", "--load-state", "a tuned initial state, not a saved one; give it with --state"),
        ("tuned.safetensors", "--load-state", "a tuned initial state, not a saved one; give it with --state"),
    ]:
        wrong(generate("a", option, tmp_path / name), f"{tmp_path / name}: {says}")
    wrong(generate("a", "--state", byte_model), f"{byte_model}: already converted; run it with -m")
    source = byte_model.with_suffix(".pth")
    wrong(generate("a", "--state", source), f"{source}: not a tuned initial state, since it holds no blocks.0")
    (tmp_path / "junk").write_bytes(b"junk" * 99)
    wrong(generate("a", "--state", tmp_path / "junk"), f"{tmp_path}/junk: neither a torch .pth nor a safetensors or")


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


def facts(result: Result) -> dict[str, Any]:
    """Return the object that --json printed."""
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


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
    assert left(tmp_path) == set()


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
    pexpect = pytest.importorskip("pexpect")
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


def test_states_of_python_programs(byte_model: Path, tmp_path: Path) -> None:
    model = rwkv_cli.load(byte_model)
    assert isinstance(model, LanguageModel)
    read(byte_model).save(tmp_path / "state", {"unread": "é"})
    start = load_start(tmp_path / "state", model)
    assert (start.ids, start.unread, start.counts) == ((), "é", {})
