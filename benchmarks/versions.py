"""Speed of two installed versions of rwkv-cli, in alternating runs of one sitting.

    python benchmarks/versions.py PYTHON_A PYTHON_B MODEL.safetensors … [--json PATH] [-r 9]

PYTHON_A and PYTHON_B are interpreters, each with one version installed. Figures are medians. The ratio is the median
of B / A over pairs of runs that follow each other, with half the range of the middle half of them; "best" is the ratio
of the best run of each, which other work on the machine disturbs least. Above 1 a rate is better and a time is worse.
A new length is a prompt of a length that its process has not seen; its preparation is what the first call takes longer
than the second. There are no figures where the two versions do not compute the same.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from peers import OURS, Peer

T = TypeVar("T")
RATES = [("decode", 32), ("prefill", 512), ("prefill", 8), ("prefill", 31), ("prefill", 100)]
NEW = range(9, 19)
FIRST_TOKEN = "import sys, rwkv_cli; m = rwkv_cli.load(sys.argv[1]); m.advance([0], m.new_state())"
BUNDLED = "import rwkv_cli; print(rwkv_cli.__path__[0] + '/storyteller.pth')"
TEXT = "Once upon a time there was a little dog who wanted to see the sea. " * 8


class Figures:
    """Pairs of what versions A and B gave, by what was measured. A name ends with its unit."""

    def __init__(self) -> None:
        self.pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def add(self, what: str, pairs: Iterable[tuple[float, float]]) -> None:
        """Keep more pairs of one kind."""
        self.pairs[what] += pairs

    def summary(self) -> dict[str, dict[str, float]]:
        """Medians, ratios and the number of pairs."""
        rows = {}
        for what, pairs in self.pairs.items():
            a, b = np.transpose(pairs)
            best = np.max if what.endswith("tok/s") else np.min
            low, middle, high = np.quantile(b / a, [0.25, 0.5, 0.75])
            row = {"a": np.median(a), "b": np.median(b), "ratio": middle, "spread": (high - low) / 2}
            rows[what] = {key: float(x) for key, x in row.items()}
            rows[what] |= {"best": float(best(b) / best(a)), "pairs": len(pairs)}
        return rows

    def show(self, title: str) -> None:
        """Print the table."""
        print(f"\n{title:40} {'A':>10} {'B':>10} {'B / A':>15} {'best':>6} {'pairs':>6}")
        for what, row in self.summary().items():
            ratio = f"{row['ratio']:.3f} ± {row['spread']:.3f}"
            print(
                f"{what:40} {row['a']:10.4g} {row['b']:10.4g} {ratio:>15} {row['best']:6.3f} {row['pairs']:6}",
                flush=True,
            )


def alternate(a: Callable[[], T], b: Callable[[], T], repetitions: int) -> list[tuple[T, T]]:
    """The results of the two calls, one pair after the other. They take turns in coming first."""
    pairs = []
    for turn in range(repetitions):
        if turn % 2:
            second = b()
            pairs.append((a(), second))
        else:
            pairs.append((a(), b()))
    return pairs


def rates(pythons: list[Path], model: Path, threads: int, repetitions: int) -> Figures:
    """Decode, prefill and new lengths, in three pairs of processes."""
    figures = Figures()
    ids = [int(i) for i in np.random.default_rng(0).integers(1, 256, max(count for _, count in RATES))]
    for _ in range(3):
        a, b = (Peer(str(python), OURS, str(python), model, threads, ids) for python in pythons)
        mine, other = (np.array(peer.ask("logits", 32)) for peer in (a, b))
        if not np.linalg.norm(mine - other) <= 1e-3 * np.linalg.norm(mine):
            raise SystemExit("the versions do not compute the same; no figure is worth anything")
        for what, count in RATES:
            calls = partial(alternate, partial(a.ask, what, count), partial(b.ask, what, count))
            calls(1)
            figures.add(f"{what} {count}, tok/s", calls(repetitions))
        for count in NEW:
            calls = partial(alternate, partial(a.ask, "prefill", count), partial(b.ask, "prefill", count))
            first, second = (1e3 * count / np.array(calls(1)) for _ in range(2))
            figures.add("new length, first call, ms", first.tolist())
            figures.add("new length, its preparation, ms", (first - second).tolist())
        for peer in (a, b):
            peer.end()
    return figures


def process(python: Path, *arguments: str | Path, fresh: bool = False) -> tuple[float, float]:
    """Wall and CPU seconds of a process. A fresh one finds no compiled kernel."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "XDG_CACHE_HOME": cache} if fresh else dict(os.environ)
        start = time.perf_counter()
        running = subprocess.Popen(
            [python, "-P", *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(running.pid, 0)
        wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"failed: {python} {' '.join(map(str, arguments))}")
    return wall, usage.ru_utime + usage.ru_stime


def processes(pythons: list[Path], model: Path, repetitions: int) -> Figures:
    """Start-up with everything in its cache, and first uses with no kernel compiled."""
    figures = Figures()
    bundled = subprocess.run([pythons[0], "-P", "-c", BUNDLED], check=True, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(TEXT)
        rwkv = ["-m", "rwkv_cli"]
        warm: dict[str, list[str | Path]] = {
            "rwkv --help": [*rwkv, "--help"],
            "import of the models": ["-c", "import rwkv_cli.models"],
            "load and first token": ["-c", FIRST_TOKEN, model],
        }
        cold: dict[str, list[str | Path]] = {
            "first generate": [*rwkv, "generate", "Hello", "-m", model, "--max-tokens", "1"],
            "first ppl": [*rwkv, "ppl", text, "-m", model],
            "first convert": [*rwkv, "convert", bundled.stdout.strip(), text.with_suffix(".safetensors"), "--force"],
        }
        for commands, fresh, count in ((warm, False, 4 * repetitions), (cold, True, repetitions)):
            for what, arguments in commands.items():
                a, b = (partial(process, python, *arguments, fresh=fresh) for python in pythons)
                if not fresh:
                    alternate(a, b, 1)
                pairs: NDArray[np.float64] = np.array(alternate(a, b, count))
                figures.add(f"{what}, s", pairs[:, :, 0].tolist())
                figures.add(f"{what}, CPU s", pairs[:, :, 1].tolist())
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", type=Path, nargs=2, metavar="PYTHON")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "-r", "--repetitions", type=int, default=9, help="pairs of each rate in each of three processes"
    )
    parser.add_argument("--processes", type=int, default=3, help="pairs of cold runs, and four times as many warm ones")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there, too")
    options = parser.parse_args()
    pythons = [python.absolute() for python in options.pythons]
    models = [model.absolute() for model in options.models]
    measured = {model.name: partial(rates, pythons, model, options.threads, options.repetitions) for model in models}
    if options.processes:
        measured["processes"] = partial(processes, pythons, models[0], options.processes)
    report = {}
    for title, measure in measured.items():
        figures = measure()
        figures.show(title)
        report[title] = figures.summary()
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
