"""Measure what int8 costs a model in tasks, against the same model in float: the table of docs/quantization.md.

    python benchmarks/tasks.py CHECKPOINT TEXT [--items N]

The text is cut into passages of 60 words. The last word of each is one task, as in LAMBADA. The other is to choose the
eight words that follow it, among those that follow three other passages. Then come sums of numbers of one digit, four
of them solved before, and recall of a word after 128 tokens. Prints a row of the table for each task.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rwkv_cli.engine.evaluating import Measure, Tally
from rwkv_cli.engine.generated import NEVER, Recall, arithmetic
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.tasks import Task, read_task

PASSAGE, FOLLOWING = 60, 8
"""Words of a passage, and of what follows it."""

NAMES = {"accuracy": "accuracy", "nll_word": "NLL of the word", "nll": "NLL of the word", "accuracy_sum": "accuracy"}


def tasks_of(text: str, items: int) -> Iterator[tuple[str, Task]]:
    """Yield the tasks with their names."""
    words = text.split()
    starts = range(0, len(words) - PASSAGE - FOLLOWING, PASSAGE + FOLLOWING)
    passages = [(" ".join(words[at : at + PASSAGE]), " ".join(words[at + PASSAGE :][:FOLLOWING])) for at in starts]
    passages = passages[:items]
    last = "\n".join(json.dumps({"text": passage}) for passage, _ in passages)
    yield "last word", read_task("passages", last.encode())
    rng = np.random.default_rng(0)
    questions = []
    for passage, following in passages:
        others = rng.choice([other for _, other in passages if other != following], 3, replace=False).tolist()
        questions.append(json.dumps({"question": passage, "choices": [following, *others], "answer": 0}))
    yield "which of four endings", read_task("endings", "\n".join(questions).encode(), "{question}")
    yield "sums of one digit", arithmetic(1, items, seed=0)
    yield "recall after 128 tokens", Recall(128, min(items, 100), seed=0)


def row(m: Measure) -> str:
    """Cells of a table: float, the difference of int8 with its standard error, and p."""
    assert m.against is not None
    scale, unit = (100, " %") if m.name.startswith("accuracy") else (1, "")
    a = m.against
    return (
        f"{NAMES[m.name]} | {scale * a.other:.4g}{unit} | {scale * a.difference:+.3g} ± {scale * a.stderr:.2g}{unit} | "
        f"{a.p:.2f}"
    )


def main() -> None:
    """Convert to float and int8, give both the tasks, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--items", type=int, default=400)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for quant in ("int8", "none"):
            target = Path(folder, quant)
            command = [sys.executable, "-P", "-m", "rwkv_cli", "convert", args.checkpoint, target, "--quant", quant]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            models.append(LanguageModel.load(target))
        for name, task in tasks_of(args.text.read_text(encoding="utf-8"), args.items):
            tally = Tally(task)
            for step in task.run(models):
                tally.add(step.answers)
            for part in tally.parts:
                for measure in part.measures():
                    if measure.name in NAMES and part.name != NEVER:
                        print(f"| {name}, {len(part.answers)} | {row(measure)} |", flush=True)


if __name__ == "__main__":
    main()
