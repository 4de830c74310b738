"""Measure what it takes to read several tokens in one pass: ahead of one text, or of many texts at once.

    python benchmarks/speculation.py rows MODEL              passes of 1, 2, 4 and 8 tokens of one text
    python benchmarks/speculation.py batch MODEL             passes of 1 to 32 texts
    python benchmarks/speculation.py text MODEL PROMPTS [--draft DRAFT] [-n 200] [--temperature T]

PROMPTS has a prompt a line; `text` makes each text with and without guesses, which must be the same. All runs
alternate. Where other programs share the machine, the fastest run of each kind says the most, and --threads 1 says more
than two: seconds are then those that the thread had a core for.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rwkv_cli.engine.completion import Completion, Request, new_sampler
from rwkv_cli.engine.drafting import DraftModel, PromptLookup
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.engine.speculation import Pace, Speculation
from rwkv_cli.kernels.cpu.compile import instructions
from rwkv_cli.models import State


def clock(model: LanguageModel) -> float:
    """Seconds. Those of one thread are the ones in which it ran."""
    return time.perf_counter() if model.threads > 1 else time.thread_time()


def alternate(model: LanguageModel, runs: dict[int, Callable[[], object]], rounds: int) -> dict[int, list[float]]:
    """Seconds of each run, in rounds."""
    seconds: dict[int, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = clock(model)
            run()
            if number:
                seconds[name].append(clock(model) - start)
    return seconds


def rows(model: LanguageModel, rounds: int) -> None:
    """Passes of one text."""
    rng, state, snapshots = np.random.default_rng(0), model.new_state(), model.new_snapshots(8)
    ids = rng.integers(0, model.config.vocab, 8).tolist()
    model.advance(ids, state)
    runs: dict[int, Callable[[], object]] = {1: lambda: model.advance(ids[:1], state)}
    runs |= {n: lambda n=n: model.read_ahead(ids[:n], state, snapshots) for n in (2, 4, 8)}
    seconds = alternate(model, runs, rounds)
    print("rows   fastest   median   to one row: fastest, median of pairs")
    for n, taken in seconds.items():
        pairs = statistics.median(a / b for a, b in zip(taken, seconds[1], strict=True))
        least = min(taken) / min(seconds[1])
        print(f"{n:4} {min(taken) * 1e3:7.1f} ms {statistics.median(taken) * 1e3:6.1f} ms {least:6.2f} {pairs:6.2f}")


def batch(model: LanguageModel, rounds: int) -> None:
    """Passes of many texts, one token each."""
    sizes = (1, 2, 4, 8, 16, 32)
    states = {n: State.stack([model.new_state()] * n) for n in sizes}
    ids = np.random.default_rng(0).integers(0, model.config.vocab, (32, 1)).tolist()
    seconds = alternate(model, {n: lambda n=n: model.advance_batch(ids[:n], states[n]) for n in sizes}, rounds)
    print("texts   fastest   tok/s of all: fastest, median; to one text")
    for n, taken in seconds.items():
        fastest, median = n / min(taken), n / statistics.median(taken)
        print(f"{n:5} {min(taken) * 1e3:7.1f} ms {fastest:7.0f} {median:7.0f} {fastest * min(seconds[1]):6.2f}")


class Fixed(Pace):
    """Always as many guesses, whether they pay or not."""

    def __init__(self, guesses: int) -> None:
        super().__init__()
        self.guesses = guesses

    def best(self) -> int:
        return self.guesses


def text(
    model: LanguageModel, prompts: list[str], draft: LanguageModel | None, tokens: int, settings: Sampling
) -> None:
    """Whole texts without guesses, with so many, and with as many as pay."""
    paces = {"none": None, "1": Fixed(1), "3": Fixed(3), "7": Fixed(7), "as it pays": Pace()}
    total = {name: np.zeros(4) for name in paces}
    speculation = Speculation(model, PromptLookup())
    for prompt in prompts:
        ids, texts = [0, *model.text_tokenizer.encode(prompt)], set()
        for name, pace in paces.items():
            sampler, request = new_sampler(model, settings, 1), Request(ids, tokens)
            completion = Completion(
                model, model.new_state(), sampler, request, speculation=speculation if pace else None
            )
            if pace:
                speculation.drafter = PromptLookup() if draft is None else DraftModel(draft, model)
                speculation.pace = pace
            completion.read(len(ids) - 1, lambda _: None)
            start = clock(model)
            texts.add("".join(completion.stream()))
            result, seconds = completion.result, clock(model) - start
            total[name] += result.tokens, seconds, result.drafted, result.accepted
        assert len(texts) == 1, "guesses have changed a text"
    print("guesses       tokens   tok/s   to none   guesses right   tokens a pass")
    plain = total["none"][0] / total["none"][1]
    for name, (made, seconds, drafted, accepted) in total.items():
        speed, right = made / seconds, f"{accepted:.0f} of {drafted:.0f}"
        print(f"{name:12} {made:7.0f} {speed:7.1f} {speed / plain:9.2f} {right:>15} {made / (made - accepted):15.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rows", "batch", "text"])
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path, nargs="?")
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("-n", "--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--no-penalties", action="store_true")
    options = parser.parse_args()
    model = LanguageModel.load(options.model, threads=options.threads)
    print(f"{options.model.name}, {model.threads} threads, {instructions()}")
    if options.what == "rows":
        rows(model, options.rounds)
    elif options.what == "batch":
        batch(model, options.rounds)
    else:
        settings = Sampling(temperature=options.temperature)
        if options.no_penalties:
            settings = settings.changed(presence_penalty=0, frequency_penalty=0)
        draft = LanguageModel.load(options.draft, threads=options.threads) if options.draft else None
        text(model, options.prompts.read_text().splitlines(), draft, options.tokens, settings)


if __name__ == "__main__":
    main()
