"""Every version against the float64 oracle, against itself in other cuts, and against the reference's numbers."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import tiny
from naive import error_ratio

import rwkv_cli
from rwkv_cli.models import State

IDS = [0, *np.random.default_rng(1).integers(0, 300, 40).tolist()]
GOLDENS = json.loads((Path(__file__).parents[1] / "goldens.json").read_text())
CHECKPOINTS = {
    "tiny-rwkv-4v0-660K": "4",
    "tiny-rwkv-5v1-730K": "5.0",
    "tiny-rwkv-5v2-730K": "5.2",
    "tiny-rwkv-6v0-1m": "6",
    "tiny-rwkv-7v0-834K": "7",
    "stories-7-6M": "7",
}

Convert = Callable[..., Path]


@pytest.mark.parametrize("version", [*tiny.VERSIONS, "5.0r2"])
@pytest.mark.parametrize(("width", "head", "ffn"), [(48, 16, 96), (40, 8, 70), (192, 64, 224), (64, 64, 256)])
def test_floats_match_the_oracle(converted: Convert, version: str, width: int, head: int, ffn: int) -> None:
    sizes = {"width": width, "head": head, "ffn": ffn}
    want = naive.Naive(version, tiny.weights(version, **sizes)).forward(IDS)
    model = rwkv_cli.load(converted(version, "none", **sizes))
    got, _ = model.forward(IDS, all_logits=True)
    assert got.dtype == np.float32
    assert error_ratio(got, want) < 1e-5
    assert np.abs(got - want).max() < 1e-4


@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize(("quant", "most", "most_kl"), [("int8", 0.05, 1e-3), ("q6", 0.1, 5e-3), ("q4", 0.35, 0.06)])
def test_quantized_is_near_the_source(
    converted: Convert, version: str, quant: str, most: float, most_kl: float
) -> None:
    """Beyond the weights' rounding only that of activations to 15 bits is left."""
    model = rwkv_cli.load(converted(version, quant))
    exact = rwkv_cli.load(converted(version, "none"))
    got, _ = model.forward(IDS, all_logits=True)
    want, _ = exact.forward(IDS, all_logits=True)
    assert error_ratio(got, want) < most
    kl = np.exp(naive.log_softmax(want.astype(float))) * (
        naive.log_softmax(want.astype(float)) - naive.log_softmax(got.astype(float))
    )
    assert kl.sum(-1).mean() < most_kl


@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("quant", ["int8", "none"])
@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1000])
def test_any_cut_gives_the_same(converted: Convert, version: str, quant: str, chunk: int) -> None:
    model = rwkv_cli.load(converted(version, quant))
    length = 290 if chunk < 7 else 530  # a pass has at most 252 rows; small steps need not go beyond two
    ids = np.random.default_rng(2).integers(0, 300, length)
    whole, end = model.forward(ids, all_logits=True)
    state, parts = model.new_state(), []
    for at in range(0, len(ids), chunk):
        logits, state = model.forward(ids[at : at + chunk], state, all_logits=True)
        parts.append(logits)
    got = np.concatenate(parts)
    for a, b in [(got, whole), *((state.arrays()[name], end.arrays()[name]) for name in end.arrays())]:
        assert error_ratio(a, b) < 1e-5
    last, _ = model.forward(ids)
    assert error_ratio(last, whole[-1]) < 1e-6


@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("quant", ["int8", "none"])
@pytest.mark.parametrize("chunk", [1, 8, 256])
def test_a_sequence_in_a_batch_is_as_if_alone(
    converted: Convert, version: str, quant: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rwkv_cli.load(converted(version, quant))
    rng = np.random.default_rng(4)
    # cut by a chunk of 8 inside a sequence, between two, and more than once in one
    rounds = [
        [rng.integers(0, 300, n) for n in lengths]
        for lengths in ((1, 19, 4, 8, 1, 3), (1,) * 6, (2, 1, 5, 8, 8, 1), (0, 1, 0, 9, 8, 0), (0, 0, 1, 0, 0, 0))
    ]
    alone = [model.forward(IDS[:n])[1] if n else model.new_state() for n in (3, 0, 5, 0, 1, 2)]
    together = State.stack(alone)
    for parts in rounds:
        want = [model.advance(ids, state) for ids, state in zip(parts, alone, strict=True) if len(ids)]
        with monkeypatch.context() as patch:
            patch.setattr("rwkv_cli.kernels.cpu.backend.chunk", chunk)
            got = model.advance_batch(parts, together)
        pairs = [(got, np.array(want))]
        pairs += [(together.arrays()[name], array) for name, array in State.stack(alone).arrays().items()]
        for a, b in pairs:
            assert error_ratio(a, b) < 1e-6
            if quant == "int8":
                np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(together.row(2).clone().wkv, together.wkv[:, 2])


def test_outputs_are_what_the_head_reads(converted: Convert) -> None:
    model = rwkv_cli.load(converted("7", "none"))
    states = model.new_state(), model.new_state()
    outputs, logits = model.outputs(IDS, states[0]), model.advance(IDS, states[1], all_logits=True)
    assert error_ratio(outputs @ tiny.weights("7")["head.weight"].T, logits) < 1e-5
    np.testing.assert_array_equal(states[0].wkv, states[1].wkv)


def test_a_batch_is_checked(converted: Convert) -> None:
    model = rwkv_cli.load(converted("7"))
    one = model.new_state()
    for states in ([], [one, rwkv_cli.load(converted("6")).new_state()], [one, State.stack([one])]):
        with pytest.raises(ValueError, match="one state or more, all of one model"):
            State.stack(states)
    batch = State.stack([one, one])
    kept = batch.clone()
    for ids, says in [([], "one sequence"), ([[], []], "one sequence with ids"), ([[1], [300]], "vocabulary of 300")]:
        with pytest.raises(ValueError, match=says):
            model.advance_batch(ids, batch)
    for state in (one, State.stack([one] * 3)):
        with pytest.raises(ValueError, match=r"float32 \[3, 2, 48\]: it is not of this model and this many sequences"):
            model.advance_batch([[1], [2]], state)
    with pytest.raises(ValueError, match="contiguous"):
        model.advance([1], batch.row(0))
    with pytest.raises(ValueError, match=r"float32 \[3, 48\]: it is not of this model$"):
        model.advance([1], batch)
    for name, array in batch.arrays().items():
        np.testing.assert_array_equal(array, kept.arrays()[name])


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_a_state_is_the_callers(converted: Convert, version: str, tmp_path: Path) -> None:
    model = rwkv_cli.load(converted(version))
    _, state = model.forward(IDS)
    kept = state.clone()
    one, after = model.forward([5, 6], state)
    for name in state.arrays():
        np.testing.assert_array_equal(state.arrays()[name], kept.arrays()[name])
        assert not np.shares_memory(state.arrays()[name], after.arrays()[name])
    state.save(tmp_path / "state")
    loaded = State.load(tmp_path / "state", model.new_state())
    for other in (kept, loaded):
        again, _ = model.forward([5, 6], other)
        np.testing.assert_array_equal(again, one)


def test_a_state_of_another_model_is_refused(converted: Convert, tmp_path: Path) -> None:
    rwkv_cli.load(converted("7")).new_state().save(tmp_path / "state")
    with pytest.raises(ValueError, match="the model's is"):
        State.load(tmp_path / "state", rwkv_cli.load(converted("7", width=64)).new_state())
    # of the same shapes, but another meaning
    with pytest.raises(ValueError, match="a state of RWKV-7, the model is RWKV-6"):
        State.load(tmp_path / "state", rwkv_cli.load(converted("6")).new_state())
    wrong = rwkv_cli.load(converted("7")).new_state()
    with pytest.raises(ValueError, match="the state is one of RWKV-7, the model RWKV-6"):
        rwkv_cli.load(converted("6")).forward([1], wrong)
    for name, bad in [("wkv", wrong.wkv[:1]), ("att_shift", wrong.att_shift.astype(float)), ("ffn_shift", [[0.0]])]:
        with pytest.raises(ValueError, match=f"the state's {name} must be float32"):
            rwkv_cli.load(converted("7")).forward([1], dataclasses.replace(wrong, **{name: bad}))
    wrong.wkv.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        rwkv_cli.load(converted("7")).advance([1], wrong)
    (tmp_path / "junk").write_bytes(b"junk" * 9)
    with pytest.raises(ValueError, match="not a saved state"):
        State.load(tmp_path / "junk", rwkv_cli.load(converted("7")).new_state())


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_a_tuned_state_in_the_checkpoint_is_where_texts_start(version: str, tmp_path: Path, rwkv: Any) -> None:
    tensors = tiny.weights(version)
    tuned = np.random.default_rng(3).standard_normal((3, 3, 16, 16)).astype(np.float32)
    merged = tensors | {f"blocks.{i}.att.time_state": tuned[i] for i in range(3)}
    assert (
        rwkv("convert", tiny.write_pth(tmp_path / "a.pth", merged, "F32"), tmp_path / "a", "--quant", "none").exit_code
        == 0
    )
    state = rwkv_cli.load(tmp_path / "a").new_state()
    # files hold [value, key]; the models run on [key, value]
    np.testing.assert_array_equal(state.wkv, tuned.transpose(0, 1, 3, 2))


@pytest.mark.parametrize("ids", [[], [[1]], [1.5], [300], [-1], [2**40]])
def test_ids_are_checked(converted: Convert, ids: Any) -> None:
    model = rwkv_cli.load(converted("7"))
    with pytest.raises(ValueError, match=r"ids must be|outside the model's vocabulary of 300"):
        model.forward(ids)


@pytest.mark.parametrize(
    ("option", "value"),
    [("threads", 0), ("threads", 10**6), ("threads", "2"), ("threads", 1.5), ("device", "tpu")],
)
def test_what_the_machine_lacks_is_refused(converted: Convert, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=str(value)):
        rwkv_cli.load(converted("7"), **{option: value})


def test_threads_do_not_change_the_result(converted: Convert) -> None:
    a, _ = rwkv_cli.load(converted("7"), threads=1).forward(IDS)
    b, _ = rwkv_cli.load(converted("7")).forward(IDS)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_numbers_of_the_reference(converted: Convert, version: str) -> None:
    """goldens.json holds what the rwkv package or a demo of RWKV-LM gives for these models (tools/make_goldens.py)."""
    golden = GOLDENS[version]
    model = rwkv_cli.load(converted(version, "none", **golden["sizes"]))
    logits, _ = model.forward(golden["ids"][:-1], all_logits=True)
    assert error_ratio(logits[-1], golden["logits"]) < 1e-5
    nll = model.losses(golden["ids"][:-1], golden["ids"][1:], model.new_state())
    np.testing.assert_allclose(nll.sum(), golden["nll_sum"], rtol=1e-5)


@pytest.mark.parametrize(("name", "version"), CHECKPOINTS.items())
def test_real_checkpoints(shared: Path, tmp_path: Path, rwkv: Any, name: str, version: str) -> None:
    folder = shared / "checkpoints"
    source, golden = folder / f"{name}.pth", folder / f"{name}.golden.json"
    if (folder / name).is_dir():
        source, golden = folder / name / "model.pth", folder / name / "golden.json"
    facts = json.loads(golden.read_text())
    assert rwkv("convert", source, tmp_path / "m", "--quant", "none").exit_code == 0
    model = rwkv_cli.load(tmp_path / "m")
    assert model.config.version == version
    logits, _ = model.forward(facts["prompt_ids"])
    assert error_ratio(logits, facts["logits"]) < 5e-6
    if "ids" in facts:
        assert model.tokenizer is not None
        text = (source.parent / "heldout.txt").read_bytes()
        assert [0, *model.tokenizer.encode(text)] == facts["ids"]
    ids = facts.get("ids") or [0, *(shared / "text" / "tinyshakespeare.txt").read_bytes()[:512]]
    nll = model.losses(ids[:-1], ids[1:], model.new_state())
    np.testing.assert_allclose(nll, facts["nll"], atol=2e-5)
    np.testing.assert_allclose(nll.sum(), facts.get("nll_sum") or facts["nll_sum_512"], rtol=1e-5)


def test_a_real_7a_gives_the_logits_that_came_with_it(shared: Path, tmp_path: Path, rwkv: Any) -> None:
    case = shared / "cases" / "interop" / "7a"
    if not case.is_dir():
        pytest.skip("no RWKV-7a from elsewhere; goldens.json has numbers of RWKV-LM's demo")
    assert rwkv("convert", case / "model.pth", tmp_path / "m", "--quant", "none").exit_code == 0
    got, _ = rwkv_cli.load(tmp_path / "m").forward(np.load(case / "ids.npy"), all_logits=True)
    assert np.abs(got - np.load(case / "logits.npy")).max() < 5e-5
