"""The sampler against a plain implementation of the reference's order, the reference itself, and its own promises."""

import math
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from extras import needs
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rwkv_cli.engine.sampling import Sampler, Sampling, candidates

PLAIN = Sampling(1.0, 1.0, presence_penalty=0.0, frequency_penalty=0.0)
modest = settings(max_examples=100, deadline=None)
# steps that show in a probability, however small the difference of two logits
logit_lists = st.lists(
    st.one_of(st.integers(-2000, 2000).map(lambda n: n / 64), st.sampled_from([0.0, 1.0, -(2.0**99), 2.0**99])),
    min_size=1,
    max_size=40,
)
any_settings = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_p=st.floats(0, 1),
    top_k=st.integers(0, 50),
    min_p=st.floats(0, 1),
    presence_penalty=st.just(0.0),
    frequency_penalty=st.just(0.0),
)


def plain(logits: list[float], s: Sampling) -> dict[int, float]:
    """Probabilities of the tokens left, as rwkv/utils.py `sample_logits` has them, one step after the other."""
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    p = [w / math.fsum(weights) for w in weights]
    order = sorted(range(len(p)), key=lambda i: -p[i])
    total, cutoff = 0.0, p[order[-1]]
    for i in order:
        total += p[i]
        if total >= s.top_p:
            cutoff = p[i]
            break
    left = [i for i in order if p[i] >= cutoff] if s.top_p < 1 else order
    left = left[: s.top_k] if s.top_k else left
    left = [i for i in left if p[i] >= s.min_p * p[order[0]]]
    powers = {i: p[i] ** (1 / s.temperature) for i in left}
    return {i: w / math.fsum(powers.values()) for i, w in powers.items()}


def as_dict(logits: list[float] | np.ndarray, s: Sampling) -> dict[int, float]:
    kept, p = candidates(np.array(logits, np.float64), s)
    return dict(zip(kept.tolist(), p.tolist(), strict=True))


@modest
@given(logits=logit_lists, s=any_settings)
def test_candidates_are_the_plain_ones(logits: list[float], s: Sampling) -> None:
    p = sorted(plain(logits, PLAIN).values(), reverse=True)
    # sums are rounded: on the very border of top_p, and of min_p, either side is right
    assume(min(abs(sum(p[: i + 1]) - s.top_p) for i in range(len(p))) > 1e-9 or s.top_p in (0, 1))
    assume(min(abs(x - s.min_p * p[0]) for x in p) > 1e-12 or s.min_p in (0, 1))
    want, got = plain(logits, s), as_dict(logits, s)
    assert {i for i in got if got[i] > 1e-300} == {i for i in want if want[i] > 1e-300}
    for i in want:
        assert math.isclose(got.get(i, 0.0), want[i], rel_tol=1e-7, abs_tol=1e-12)


@modest
@given(logits=logit_lists, s=any_settings)
def test_candidates_keep_their_promises(logits: list[float], s: Sampling) -> None:
    kept, p = candidates(np.array(logits), s)
    assert 1 <= len(kept) == len(set(kept.tolist())) <= len(logits)
    assert math.isclose(p.sum(), 1, rel_tol=1e-9)
    assert (p >= 0).all()
    assert (np.diff(p) <= 0).all()  # likeliest first
    assert logits[kept[0]] == max(logits)
    assert len(kept) <= (s.top_k or len(logits))
    left_out = set(range(len(logits))) - set(kept.tolist())
    assert all(logits[i] <= min(logits[j] for j in kept[p > 0]) for i in left_out)
    full = plain(logits, PLAIN)
    assert all(full[int(i)] >= s.min_p * max(full.values()) * (1 - 1e-9) for i in kept)
    sampler = Sampler(s, 1)
    assert all(sampler.sample(np.array(logits, np.float32)) not in left_out for _ in range(3))


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({}, {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}),
        ({"top_p": 0.4}, {0: 1.0}),
        ({"top_p": 0.41}, {0: 4 / 7, 1: 3 / 7}),
        ({"top_p": 0.0}, {0: 1.0}),
        ({"top_k": 3}, {0: 4 / 9, 1: 3 / 9, 2: 2 / 9}),
        ({"top_k": 9}, {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}),
        ({"min_p": 0.6}, {0: 4 / 7, 1: 3 / 7}),
        ({"min_p": 1.0}, {0: 1.0}),
        ({"temperature": 0.5}, {0: 16 / 30, 1: 9 / 30, 2: 4 / 30, 3: 1 / 30}),
        # temperature comes last: it does not move what top-p keeps
        ({"temperature": 0.5, "top_p": 0.65}, {0: 16 / 25, 1: 9 / 25}),
        ({"temperature": 0.5, "top_p": 0.8, "top_k": 2, "min_p": 0.8}, {0: 1.0}),
    ],
)
def test_each_setting_does_its_part(change: dict[str, Any], want: dict[int, float]) -> None:
    got = as_dict(np.log([0.4, 0.3, 0.2, 0.1]) + 1e-9 * np.arange(4, 0, -1), replace(PLAIN, **change))
    assert got == pytest.approx(want, rel=1e-6)


def test_ties_with_the_last_of_top_p_stay() -> None:
    assert set(as_dict([1.0, 1.0, 0.0, 1.0], replace(PLAIN, top_p=0.3))) == {0, 1, 3}
    assert set(as_dict([1.0, 1.0, 0.0, 1.0], replace(PLAIN, top_p=0.3, top_k=2))) == {0, 1}


@pytest.mark.parametrize(
    "s",
    # with top_p = 1 the reference, whose float32 sum may stay below 1, takes the likeliest only
    [
        replace(PLAIN, top_p=0.9999),
        Sampling(),
        Sampling(0.7, 0.5),
        Sampling(2.0, 0.95, 5),
        Sampling(1.0, 0.0),
        Sampling(0.3, 0.9, 3),
    ],
    ids=str,
)
def test_the_reference_package_has_the_same_probabilities(s: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = needs("torch", "dev,reference", "the tests above compare with the formulas in NumPy")
    from rwkv.utils import PIPELINE

    caught: list[Any] = []
    monkeypatch.setattr(np.random, "choice", lambda **given: caught.append(given["p"]) or 0)
    logits = (np.random.default_rng(3).standard_normal(500) * 3).astype(np.float32)
    PIPELINE.sample_logits(None, torch.tensor(logits), s.temperature, s.top_p, s.top_k)
    got = np.zeros(500)
    got[list(as_dict(logits, s))] = list(as_dict(logits, s).values())
    np.testing.assert_allclose(got, caught[0], rtol=1e-4, atol=1e-9)
    assert ((got > 0) == (caught[0] > 0)).all()


@modest
@given(logits=logit_lists, change=st.sampled_from([{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}]))
def test_the_likeliest_is_taken(logits: list[float], change: dict[str, Any]) -> None:
    got = Sampler(replace(PLAIN, **change), 5).sample(np.array(logits, np.float32))
    assert logits[got] == max(logits)
    if change in ({"temperature": 0.0}, {"top_k": 1}):
        assert got == logits.index(max(logits))


@pytest.mark.parametrize(
    "logits", [[1e30, -1e30, 0.0], [-1e30] * 3 + [0.0], [0.0], [1e30] * 4, [-1e30] * 4, [-3.4e38, 3.4e38]]
)
@pytest.mark.parametrize("s", [PLAIN, Sampling(), Sampling(1e-3), Sampling(1e-320), Sampling(100.0, 0.5)], ids=str)
def test_extreme_logits(logits: list[float], s: Sampling) -> None:
    sampler = Sampler(s, 2)
    picked = {sampler.sample(np.array(logits, np.float32)) for _ in range(50)}
    best = {i for i, x in enumerate(logits) if x == max(logits)}
    assert picked <= best
    assert len(picked) == len(best)


def test_rounding_never_picks_what_has_no_probability() -> None:
    class Last:
        def random(self) -> float:
            return 1 - 2**-53

    logits = np.concatenate([np.random.default_rng(0).standard_normal(1000), [-1e30] * 5]).astype(np.float32)
    for scale in np.linspace(0.5, 4, 50):
        sampler = Sampler(PLAIN, 0)
        sampler._random = Last()  # type: ignore[assignment]
        assert sampler.sample((logits * scale).astype(np.float32)) < 1000


def test_same_seed_same_choices() -> None:
    logits = np.random.default_rng(4).standard_normal((200, 50)).astype(np.float32)
    first, again, other = ([sampler.sample(row) for row in logits] for sampler in (
        Sampler(Sampling(), 7), Sampler(Sampling(), 7), Sampler(Sampling(), 8)
    ))  # fmt: skip
    assert first == again
    assert first != other
    Sampler(Sampling(), 10**30).sample(logits[0])


@pytest.mark.parametrize("s", [PLAIN, replace(PLAIN, temperature=2.0, top_p=0.9), replace(PLAIN, top_k=4)], ids=str)
def test_frequencies_are_the_probabilities(s: Sampling) -> None:
    logits = np.array([0.5, -1.0, 2.0, 0.0, 1.0, -0.3, 0.9], np.float32)
    want = as_dict(logits, s)
    sampler, n = Sampler(s, 11), 20_000
    counts = np.bincount([sampler.sample(logits) for _ in range(n)], minlength=7)
    chi = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in want.items())
    assert chi < 27  # 6 degrees of freedom at most: one seed in ten thousand would exceed it
    assert sum(counts[i] for i in want) == n


def test_penalties_add_up_and_fade() -> None:
    """A token's logit falls by presence + frequency · count, and a count keeps `decay` of itself each step."""
    s = Sampling(0.0, presence_penalty=1.0, frequency_penalty=0.5, penalty_decay=0.9)
    sampler, counts = Sampler(s, 0, frozenset({3})), dict[int, float]()
    rng = np.random.default_rng(5)
    for _ in range(300):
        logits = (rng.standard_normal(6) * 1.5).astype(np.float32)
        scores = logits.astype(np.float64)
        for token, count in counts.items():
            scores[token] -= 1.0 + 0.5 * count
        want = int(scores.argmax())
        before = logits.copy()
        assert sampler.sample(logits) == want
        np.testing.assert_array_equal(logits, before)  # the caller's
        counts = {token: 0.9 * count for token, count in counts.items()}
        counts[want] = counts.get(want, 0.0) + (want != 3)  # 3 is exempt: it pays for presence alone
    assert counts[3] == 0
    assert all(counts[token] > 0 for token in (0, 1, 2, 4, 5))
    sampler.forget()
    assert sampler.sample(logits) == int(logits.argmax())


def test_a_penalty_comes_before_the_choice_of_candidates() -> None:
    s = Sampling(1.0, 1.0, 1, presence_penalty=2.0, frequency_penalty=0.0)
    sampler = Sampler(s, 0)
    assert [sampler.sample(np.array([1.0, 0.0], np.float32)) for _ in range(3)] == [0, 1, 0]
    reward = Sampler(replace(s, presence_penalty=-2.0), 0)
    reward.sample(np.array([0.0, 1.0], np.float32))
    assert reward.sample(np.array([2.0, 1.0], np.float32)) == 1


def test_defaults_are_the_reference_packages() -> None:
    s = Sampling()
    assert (s.temperature, s.top_p, s.top_k, s.min_p) == (1.0, 0.85, 0, 0.0)
    assert (s.presence_penalty, s.frequency_penalty, s.penalty_decay) == (0.2, 0.2, 0.996)


def test_penalties_are_those_of_a_table_bit_for_bit() -> None:
    """The counts were a dictionary once. Arrays give the same choices, and old counts fade to nothing."""
    s = Sampling(1.0, 0.98, presence_penalty=0.3, frequency_penalty=0.7, penalty_decay=0.97)
    sampler, plain_random = Sampler(s, 9, frozenset({1, 2})), np.random.default_rng(np.random.PCG64(9))
    table: dict[int, float] = {}
    rng = np.random.default_rng(1)
    for step in range(2000):
        logits = (rng.standard_normal(60) * 2).astype(np.float32)
        scores = logits.astype(np.float64)
        for token, count in table.items():
            scores[token] -= s.presence_penalty + s.frequency_penalty * count
        kept, p = candidates(scores, s)
        upto = np.cumsum(p)
        want = int(kept[np.searchsorted(upto, plain_random.random() * upto[-1], side="right")])
        assert sampler.sample(logits) == want
        for token in table:
            table[token] *= s.penalty_decay
        table[want] = table.get(want, 0.0) + (want not in (1, 2))
        if step == 1000:
            assert sampler.counts == table
            sampler.counts = sampler.counts
    fading = Sampler(replace(s, temperature=0.0, penalty_decay=0.5), 0)
    fading.counts = {3: 1.0}
    for _ in range(1000):
        fading.sample(np.array([1e9, 0, 0, 0], np.float32))
    assert fading.counts == {0: pytest.approx(2), 3: 0}


def test_a_choice_takes_no_new_memory_for_a_vocabulary() -> None:
    """The system would give it back after each token, and page it in again for the next one."""
    sampler, logits = Sampler(Sampling(), 3), np.random.default_rng(2).standard_normal(65536).astype(np.float32) * 6
    first = sampler.sample(logits)
    tracemalloc.start()
    second = sampler.sample(logits)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(logits)
    assert max(first, second) < len(logits)


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.6, 3.0, 300.0])
@pytest.mark.parametrize(
    "settings", [Sampling(), Sampling(top_p=1.0), Sampling(top_p=0.3), Sampling(top_p=1.0, min_p=1e-4)]
)
def test_candidates_have_the_bits_of_a_plain_sort(spread: float, settings: Sampling) -> None:
    for digits in (1, 9):  # the first has many tokens that are equally likely
        logits = np.round(np.random.default_rng(1).standard_normal(3000) * spread, digits)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        order = np.argsort(-p, kind="stable")
        p = p[order]
        last = p[min(int(np.searchsorted(np.cumsum(p), settings.top_p)), len(p) - 1)] if settings.top_p < 1 else 0.0
        count = int(((p >= last) & (p >= settings.min_p * p[0])).sum())
        kept, got = candidates(logits, settings)
        np.testing.assert_array_equal(kept, order[:count])
        want = p[:count] / p[0]
        np.testing.assert_array_equal(got, want / want.sum())
