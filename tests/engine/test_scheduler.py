"""The scheduler: many answers together, each as if alone, from states that are known."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rwkv_cli.engine.batch import complete_together
from rwkv_cli.engine.choosing import Chooser, scored
from rwkv_cli.engine.completion import Completion, Request
from rwkv_cli.engine.drafting import DraftModel, PromptLookup
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.prefixes import Bounds, Prefixes
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.engine.scheduler import Limits, Scheduler
from rwkv_cli.engine.speculation import Pace, Speculation
from rwkv_cli.engine.work import Answer, Vector, Work
from rwkv_cli.errors import BusyError
from rwkv_cli.models import State

STORY = b"Once upon a time there was a little fish who lived in the deep blue sea with nine friends. " * 3


@pytest.fixture(scope="module")
def model(byte_model: Path) -> LanguageModel:
    return LanguageModel.load(byte_model)


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    made = Scheduler(Limits(running=4, waiting=40), Prefixes(Bounds(memory=1 << 26)))
    yield made
    made.close(0)


class Watched:
    """The events of some work: `wait` returns once all of it has ended."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.changes: list[list[int]] = []
        """After each change, how many tokens each answer has."""
        self._ended = threading.Event()

    def on_change(self) -> None:
        answers = [work for work in self.works if isinstance(work, Answer)]
        self.changes.append([len(answer.result.ids) for answer in answers])
        if all(work.done for work in self.works):
            self._ended.set()

    def wait(self) -> None:
        assert self._ended.wait(100), "it has not ended"


def chooser(seed: int, top: int | None = None) -> Chooser:
    return Chooser(Sampling(presence_penalty=0.5), seed, top=top)


def ask(model: LanguageModel, watched: Watched, prompt: bytes, tokens: int = 20, seed: int = 0) -> Answer:
    answer = Answer(model, chooser(seed), Request(list(prompt), tokens, ("qq",), True), watched.on_change)
    watched.works.append(answer)
    return answer


def alone(model: LanguageModel, prompt: bytes, tokens: int = 20, seed: int = 0) -> list[int]:
    completion = Completion(
        model, model.new_state(), chooser(seed), Request(list(prompt), tokens, ("qq",), ignore_eos=True)
    )
    list(completion.stream())
    return completion.result.ids


def run(scheduler: Scheduler, watched: Watched) -> None:
    scheduler.submit(watched.works)
    watched.wait()


def test_answers_are_those_made_alone_with_and_without_known_states(model: LanguageModel, scheduler: Scheduler) -> None:
    prompts = [STORY[:n] for n in (200, 1, 17, 130, 200, 64, 270)]
    for known in (False, True):
        watched = Watched()
        answers = [ask(model, watched, prompt, 20 + i, i) for i, prompt in enumerate(prompts)]
        run(scheduler, watched)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            assert answer.result.ids == alone(model, prompt, 20 + i, i)
            assert answer.result.prompt_tokens == len(prompt)
            if known:
                assert answer.cached == len(prompt)
    assert (scheduler.running, scheduler.waiting) == (0, 0)


def test_who_comes_takes_the_row_of_who_has_ended(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made, stack = [], State.stack
    monkeypatch.setattr(State, "stack", lambda states: made.append(len(states)) or stack(states))

    def new(i: int) -> Completion:
        request = Request(list(STORY[i : 2 * i + 9]), 3 + i % 5, ("qq",), ignore_eos=True)
        return Completion(model, model.new_state(), chooser(i), request)

    completions = [new(i) for i in range(24)]
    for _ in complete_together(model, completions, 6):
        pass
    assert made == [6, 3, 1], "states move where there are half as many texts, not where others come"
    for i, completion in enumerate(completions):
        assert completion.result.ids == alone(model, STORY[i : 2 * i + 9], 3 + i % 5, i)


def test_a_conversation_goes_on_from_its_end(model: LanguageModel, scheduler: Scheduler) -> None:
    first = Watched()
    answer = ask(model, first, STORY, 40)
    run(scheduler, first)
    for back in (1, 10):  # the last tokens may be split in another way
        prompt = STORY + bytes(answer.result.ids[: 40 - back]) + b" and then"
        second = Watched()
        on = ask(model, second, prompt, 10)
        run(scheduler, second)
        assert on.cached >= len(STORY) + 16
        assert on.result.ids == alone(model, prompt, 10)


def test_what_two_prompts_share_is_known_to_the_third(model: LanguageModel, scheduler: Scheduler) -> None:
    cached = []
    for end in (b"A cat sat on the mat.", b"The dog ran home to her.", b"My bird sang all night long."):
        watched = Watched()
        answer = ask(model, watched, STORY + end, 3)
        run(scheduler, watched)
        cached.append(answer.cached)
    assert cached == [0, 0, len(STORY)]


def test_choices_read_their_prompt_once(model: LanguageModel, scheduler: Scheduler) -> None:
    watched = Watched()
    first = ask(model, watched, STORY)
    others = [Answer(model, chooser(i), first.request, watched.on_change, first) for i in (1, 2)]
    watched.works += others
    run(scheduler, watched)
    assert [answer.cached for answer in (first, *others)] == [0, len(STORY), len(STORY)]
    assert [answer.result.ids for answer in others] == [alone(model, STORY, seed=i) for i in (1, 2)]


def test_a_long_prompt_is_read_between_the_tokens_of_others(model: LanguageModel, scheduler: Scheduler) -> None:
    watched = Watched()
    short, long = ask(model, watched, b"Hi", 60), ask(model, watched, STORY * 4, 1)
    run(scheduler, watched)
    before = next(counts[0] for counts in watched.changes if counts[1])
    assert before >= len(STORY) * 4 // 64, "the other went on meanwhile"
    assert short.result.ids == alone(model, b"Hi", 60)
    assert long.result.ids == alone(model, STORY * 4, 1)


def test_who_goes_away_frees_the_place_within_a_token(model: LanguageModel, scheduler: Scheduler) -> None:
    watched = Watched()
    gone = ask(model, watched, b"Hi", 100_000)
    other = ask(model, watched, b"Ho", 50)
    at_cancel: list[int] = []

    def leave() -> None:
        watched.on_change()
        if len(gone.result.ids) == 5 and not gone.cancelled:
            gone.cancel()
            at_cancel.append(len(gone.result.ids))

    gone.on_change = leave
    run(scheduler, watched)
    assert len(gone.result.ids) <= at_cancel[0] + 1
    assert other.result.ids == alone(model, b"Ho", 50)
    assert scheduler.counts.cancelled == 1


def test_too_much_is_refused_and_nothing_of_it_taken(model: LanguageModel, scheduler: Scheduler) -> None:
    watched = Watched()
    for i in range(40):
        ask(model, watched, STORY, 5, i)
    late = Watched()
    ask(model, late, b"Hi", 1)
    scheduler.submit(watched.works)
    with pytest.raises(BusyError, match="40 answers"):
        scheduler.submit(late.works)
    with pytest.raises(ValueError, match="41 answers at once, and 40 is the most"):
        scheduler.submit([*watched.works, *late.works])
    watched.wait()
    run(scheduler, late)


def test_closing_ends_what_runs_and_refuses_what_comes(model: LanguageModel) -> None:
    scheduler = Scheduler(Limits())
    watched = Watched()
    done, endless = ask(model, watched, b"Hi", 3), ask(model, watched, b"Hi", 1_000_000)
    scheduler.submit(watched.works)
    scheduler.close(0.3)
    assert done.result.stop == "length"
    assert endless.done
    assert endless.cancelled
    with pytest.raises(BusyError, match="about to stop"):
        scheduler.submit([ask(model, watched, b"Hi", 1)])


def test_an_error_ends_one_answer_only(
    model: LanguageModel, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched()
    bad, good = ask(model, watched, b"Hi", 5), ask(model, watched, b"Ho", 5)
    monkeypatch.setattr(bad.sampler, "sample", lambda _: 1 // 0)
    run(scheduler, watched)
    assert isinstance(bad.error, ZeroDivisionError)
    assert good.error is None
    assert good.result.ids == alone(model, b"Ho", 5)


def test_a_prompt_is_scored_token_by_token(model: LanguageModel, scheduler: Scheduler) -> None:
    watched = Watched()
    answer = ask(model, watched, STORY[:100], 3)
    answer.prompt_scores, answer.top = [], 2
    only = ask(model, watched, STORY[:70], 0)
    only.prompt_scores = []
    run(scheduler, watched)
    logits, _ = model.forward(list(STORY[:100]), all_logits=True)
    wide = logits.astype(np.float64)
    p = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    want = [p[i, token] for i, token in enumerate(STORY[1:100])]
    np.testing.assert_allclose([score.logprob for score in answer.prompt_scores], want, rtol=1e-6)
    assert [score.top[0][0] for score in answer.prompt_scores] == logits[:-1].argmax(axis=1).tolist()
    assert answer.result.ids == alone(model, STORY[:100], 3)
    assert len(only.prompt_scores) == 69


def test_scores_are_the_models_own() -> None:
    made = Chooser(Sampling(temperature=0), 0, top=3, bias={7: 100.0})
    logits = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    assert made.sample(logits) == 7
    (score,) = made.scores
    assert score == scored(logits[None], [7], 3)[0]
    assert [token for token, _ in score.top] == np.argsort(-logits)[:3].tolist()


def test_a_vector_is_the_mean_of_the_outputs(model: LanguageModel, scheduler: Scheduler) -> None:
    watched = Watched()
    vector = Vector(model, list(STORY), watched.on_change)
    watched.works.append(vector)
    ask(model, watched, b"Hi", 5)
    run(scheduler, watched)
    mean = model.outputs(list(STORY), model.new_state()).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(vector.values, mean / np.linalg.norm(mean), rtol=1e-6)


class Certain:
    """A grammar of one text, of which the tokens at even places are chosen and the others demanded."""

    def __init__(self, text: bytes) -> None:
        self.left = list(text)

    def allowed(self) -> np.ndarray:
        return np.arange(256) == self.left[0]

    def take(self, token: int) -> list[int]:
        assert token == self.left.pop(0)
        forced, self.left = self.left[:2], self.left[2:]
        return forced


@pytest.mark.parametrize("stops", [(), ("in the house",), ("cat is",), ("house", "h")])
@pytest.mark.parametrize("top", [None, 0])
def test_tokens_that_are_certain_are_read_together(
    model: LanguageModel, scheduler: Scheduler, stops: tuple[str, ...], top: int | None
) -> None:
    text = "the cåt ✿ is in the cat is house 🙂."
    watched = Watched()
    sampler = Chooser(Sampling(), 0, top=top, grammar=Certain(text.encode()))
    answer = Answer(model, sampler, Request(list(b"Hi"), len(text.encode()), stops), watched.on_change)
    watched.works.append(answer)
    run(scheduler, watched)
    want = min((text.partition(stop)[0] for stop in stops), key=len, default=text)
    assert answer.result.text == want
    read, state = answer.result.read, model.new_state()
    model.advance([*b"Hi", *answer.result.ids[:read]], state)
    np.testing.assert_array_equal(answer.state.wkv, state.wkv)
    assert bytes(answer.result.ids[:read]) + answer.result.unread.encode() == want.encode()
    assert bytes(answer.result.unread_ids).decode() == answer.result.unread
    if top is None and not stops:
        assert scheduler.counts.passes < len(text)


@pytest.mark.parametrize("by", ["itself", "other", "lookup"])
def test_an_answer_that_is_alone_is_guessed_ahead(
    model: LanguageModel, converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """The first answer is alone at its beginning and at its end, and others come and go in between."""
    monkeypatch.setattr(Pace, "best", lambda _: 3)
    other = LanguageModel.load(converted("6", vocab=model.config.vocab)) if by == "other" else model
    monkeypatch.setattr(other, "tokenizer", model.tokenizer)
    speculation = Speculation(model, PromptLookup() if by == "lookup" else DraftModel(other, model))
    prefixes = Prefixes(Bounds(memory=1 << 26))
    scheduler = Scheduler(Limits(running=4), prefixes, lambda _: speculation)
    watched, late = Watched(), Watched()
    first = ask(model, watched, STORY[:90], 120)
    others = [ask(model, late, STORY[i : i + 40], 12 + i, i) for i in range(2)]
    come = threading.Event()

    def watch() -> None:
        if len(first.result.ids) > 30 and not come.is_set():
            come.set()
            scheduler.submit(late.works)
        watched.on_change()

    first.on_change = watch
    scheduler.submit([first])
    watched.wait()
    late.wait()
    assert first.error is None
    assert first.result.ids == alone(model, STORY[:90], 120)
    for i, answer in enumerate(others):
        assert answer.result.ids == alone(model, STORY[i : i + 40], 12 + i, i)
    counts = scheduler.counts
    assert counts.tokens == 120 + 12 + 13
    assert counts.accepted <= counts.drafted
    if by == "itself":
        assert counts.accepted > 60, "whoever has the same weights guesses right"
    assert by == "lookup" or counts.drafted > 0
    again = Watched()  # from what was kept of states that were views
    on = ask(model, again, STORY[:90] + bytes(first.result.ids) + b" and", 9, 1)
    scheduler.submit([on])
    again.wait()
    assert on.cached >= 90 + 100
    assert on.result.ids == alone(model, STORY[:90] + bytes(first.result.ids) + b" and", 9, 1)
    scheduler.close(0)


def test_a_certain_text_is_guessed_ahead(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses follow a copy of the grammar, and stop where the text ends."""
    monkeypatch.setattr(Pace, "best", lambda _: 7)
    speculation = Speculation(model, DraftModel(model, model))
    scheduler = Scheduler(Limits(), None, lambda _: speculation)
    for top in (None, 2):
        watched = Watched()
        text = b"a fish in the sea"
        sampler = Chooser(Sampling(), 0, top=top, grammar=Certain(text + b"\0"))
        answer = Answer(model, sampler, Request(list(b"Hi"), 40), watched.on_change)
        watched.works.append(answer)
        run(scheduler, watched)
        assert answer.error is None
        assert (answer.result.text, answer.result.stop) == (text.decode(), "eos")
        assert top is None or len(sampler.scores) == len(text) + 1
    assert scheduler.counts.accepted > 4
    scheduler.close(0)


def test_a_float_models_answers_do_not_depend_on_others(converted: Callable[..., Path]) -> None:
    """Whatever the weights' format: the same request has the same answer."""
    model = LanguageModel.load(converted("7", "none", vocab=256))
    scheduler = Scheduler(Limits(), Prefixes(Bounds(memory=1 << 26)))
    got = []
    for count in (1, 3, 3):
        watched = Watched()
        answers = [ask(model, watched, STORY, 40, i) for i in range(count)]
        run(scheduler, watched)
        got.append(answers[0].result.ids)
    scheduler.close(0)
    assert got[0] == got[1] == got[2]
