"""Tests and measures the CUDA kernels on this machine's GPU: first whether they are right, then how fast they are.

It takes a few minutes, and makes its own models with random weights in the converted format.

    python benchmarks/gpu.py --json report.json
    python benchmarks/gpu.py --text wiki.test.raw --checkpoints FOLDER
    python benchmarks/gpu.py --tiny          # tiny sizes in numba's simulator, without a GPU

FOLDER holds checkpoints NAME.pth, and beside each a NAME.golden.json: {"prompt_ids": […], "logits": […]}.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from random_models import CODES, config_of, ranks_of, write_model

RNG = np.random.default_rng(1)


@dataclass(frozen=True)
class Plan:
    """The models and the amounts that are measured."""

    sizes: dict[str, tuple[int, int, dict[str, int]]]
    """Layers, width and low ranks of each model."""
    small: tuple[int, int, int]
    """Layers, width and head size of the models that are compared."""
    vocab: int
    prompt: int
    long: int
    """Tokens of a prompt that is read in float16."""
    steps: int
    batches: tuple[int, ...]
    prefill: int
    depth: int
    score: tuple[int, int]
    """Tokens that the GPU and the CPU score."""


FULL = Plan(
    {
        "1.5B": (24, 2048, {"w": 96, "a": 96, "v": 64, "g": 256}),
        "2.9B": (32, 2560, {"w": 96, "a": 96, "v": 64, "g": 320}),
        "7.2B": (32, 4096, {"w": 128, "a": 128, "v": 96, "g": 480}),
    },
    (2, 256, 64), 65536, 60, 200, 100, (64, 256), 2048, 100_000, (20_000, 500),
)  # fmt: skip
TINY = Plan(
    {"tiny": (1, 32, {"w": 8, "a": 8, "v": 8, "g": 8})}, (2, 32, 16), 64, 9, 70, 3, (2, 3), 9, 6, (4, 4)
)  # fmt: skip


@dataclass
class Report:
    begun: float = field(default_factory=time.perf_counter)
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def error(self, what: str, ratio: float, limit: float) -> None:
        """Add an error ratio, which must be under a limit."""
        self.add(what, ratio, f"{ratio:.1e}", f"under {limit:.0e}")
        if not ratio < limit:
            self.wrong.append(what)

    def add(self, what: str, figure: Any, text: str, aim: str = "") -> None:
        self.facts[what] = figure
        self.rows.append((what, text, aim))
        print(
            f"{time.perf_counter() - self.begun:6.1f} s  {what}: {text}{f'  (aim: {aim})' if aim else ''}", flush=True
        )


def error_ratio(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def limit_of(quant: str) -> float:
    """The largest error ratio to the CPU's. A value between two levels of 8 bits may fall to either side."""
    return 1e-4 if quant == "none" else 1e-2


FLOAT16_LIMIT = 2e-2
"""The largest error ratio of a prompt whose products are in float16, beside integers of 8 and 15 bits on the CPU."""


def correctness(report: Report, plan: Plan, folder: Path) -> None:
    """Compare logits and states of each version with the CPU's: after prompts, single tokens and a batch."""
    import rwkv_cli
    from rwkv_cli.models import State

    layers, width, head = plan.small
    versions = ("4", "5.0", "5.1", "5.2", "6", "7", "7a", "8-rc00")
    for version, quant in [*((version, "int8") for version in versions), *(("7", quant) for quant in (*CODES, "none"))]:
        path = folder / f"small-{version}-{quant}.safetensors"
        write_model(path, config_of(version, layers, width, head, plan.vocab, ranks_of(version, 32)), quant)
        ids = RNG.integers(0, plan.vocab, plan.prompt + plan.steps).tolist()
        long_ids = RNG.integers(0, plan.vocab, plan.long)
        results = []
        for device in ("cpu", "cuda"):
            model = rwkv_cli.load(path, device=device)
            logits, state = model.forward(ids[: plan.prompt], all_logits=True)
            ones = [model.advance([token], state) for token in ids[plan.prompt :]]
            batch = State.stack([state, model.new_state()])
            together = model.advance_batch([ids[:1], ids[:3]], batch)
            arrays = [np.asarray(array) for array in (*state.arrays().values(), *batch.arrays().values())]
            many, _ = model.forward(long_ids, all_logits=True)
            results.append([logits, np.array(ones), together, *arrays, many])
        *errors, long = (error_ratio(got, want) for want, got in zip(*results, strict=True))
        what = f"error of RWKV-{version} in {quant}, to the CPU's"
        report.error(what, float(np.max(errors)), limit_of(quant))
        report.error(f"{what}, of {plan.long} tokens", long, limit_of(quant) if quant == "none" else FLOAT16_LIMIT)
        path.unlink()


def goldens(report: Report, checkpoints: Path, folder: Path) -> None:
    """Compare float conversions of real checkpoints with the reference package's logits."""
    from click.testing import CliRunner

    import rwkv_cli
    from rwkv_cli.main import cli

    for golden in sorted(checkpoints.glob("*.golden.json")):
        source, target = golden.with_name(golden.name.replace(".golden.json", ".pth")), folder / "golden.safetensors"
        facts = json.loads(golden.read_text())
        done = CliRunner().invoke(cli, ["convert", str(source), str(target), "--quant", "none", "--force"])
        if done.exit_code:
            raise SystemExit(f"{source}: {done.output}")
        logits, _ = rwkv_cli.load(target, device="cuda").forward(facts["prompt_ids"])
        worst = error_ratio(logits, facts["logits"])
        report.error(f"golden {source.stem}", worst, limit_of("none"))


def rate(run: Callable[[], object], tokens: int, repetitions: int = 3) -> float:
    """Tokens a second, the best of some runs."""
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return tokens / min(seconds)


def speed(report: Report, plan: Plan, folder: Path, text: Path | None, simulated: bool) -> None:
    import rwkv_cli
    from rwkv_cli.kernels.cuda import backend as cuda

    bandwidth, peak = cuda.read_bandwidth(1), cuda.product_peak(1)
    report.add("copy bandwidth", bandwidth, f"{bandwidth / 1e9:,.0f} GB/s")
    if peak:
        report.add("product peak", peak, f"{peak / 1e12:,.0f} T products of 8 × 15 bits/s by mma.sync")
    names = list(plan.sizes)
    for name, (layers, width, ranks) in plan.sizes.items():
        path, config = (
            folder / f"{name}.safetensors",
            config_of("7", layers, width, 16 if simulated else 64, plan.vocab, ranks),
        )
        for quant in (*CODES, *(["none"] if name == names[0] else [])):
            read = write_model(path, config, quant)
            model = rwkv_cli.load(path, device="cuda")
            decode(report, plan, f"{name} in {quant}", model, read, bandwidth)
            if name == names[-1] or quant == "none":
                together(report, plan, f"{name} in {quant}", model)
            del model
        read = write_model(path, config)
        begin = time.perf_counter()
        model = rwkv_cli.load(path, device="cuda")
        seconds, size = time.perf_counter() - begin, path.stat().st_size
        report.add(f"load {name}", seconds, f"{seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s")
        decode(report, plan, name, model, read, bandwidth)
        if name == names[0]:
            depths(report, plan, model, simulated)
            scoring(report, plan, model, path, text)
        if name == names[-1]:
            together(report, plan, name, model)
            if not simulated:
                peers(report, layers, width, report.facts[f"decode {name}, batch 1"])
        del model
        path.unlink()


def decode(report: Report, plan: Plan, name: str, model: Any, read: int, bandwidth: float) -> None:
    """Measure one sequence, token by token. `read` is how many bytes of matrices a token reads."""
    state = model.new_state()
    for token in (1, 2, 3):  # the first compiles kernels, the second captures a graph
        model.advance([token], state)
    graph = next(reversed(model._passes.values())).executable.is_graph
    tokens = RNG.integers(0, plan.vocab, plan.steps)
    per_second = rate(lambda: [model.advance([token], state) for token in tokens], plan.steps)
    share = per_second * (read + 2 * sum(array.nbytes for array in state.arrays().values())) / bandwidth
    text = f"{per_second:,.1f} tok/s, {share:.0%} of the bandwidth{', a graph' * graph}"
    aim = {"7.2B": "60 % of bandwidth", "1.5B": "40 % of bandwidth"}.get(name, "")
    report.add(f"decode {name}, batch 1", per_second, text, aim)
    report.facts |= {f"share {name}": share, f"graph {name}": graph}


def together(report: Report, plan: Plan, name: str, model: Any) -> None:
    """Measure many sequences together, and a long prompt."""
    from rwkv_cli.models import State

    for size in plan.batches:
        batch = State.stack([model.new_state()] * size)
        ids = [[int(token)] for token in RNG.integers(0, plan.vocab, size)]
        per_second = rate(lambda ids=ids, batch=batch: model.advance_batch(ids, batch), size, 5)
        report.add(f"decode {name}, batch {size}", per_second, f"{per_second:,.0f} tok/s")
        del batch
    state, tokens = model.new_state(), RNG.integers(0, plan.vocab, plan.prefill)
    per_second = rate(lambda: model.advance(tokens, state), plan.prefill)
    aim = "5,000 tok/s" if name == "7.2B" else ""
    report.add(f"prefill {name}, T = {plan.prefill}", per_second, f"{per_second:,.0f} tok/s", aim)


def depths(report: Report, plan: Plan, model: Any, simulated: bool) -> None:
    """Measure time and memory of a token at the beginning and after many."""
    from rwkv_cli.kernels.cuda.gpus import free_memory

    state, figures, steps, chunk = model.new_state(), [], 1 if simulated else 64, model.backend.chunk
    # Programs and graphs for all numbers of rows take their memory before the first look at it.
    model.forward(RNG.integers(0, plan.vocab, min(plan.depth, plan.depth % chunk + 2 * chunk)))
    for tokens in (1, plan.depth):
        model.advance(RNG.integers(0, plan.vocab, tokens), state)
        per_second = rate(lambda: [model.advance([1], state) for _ in range(steps)], steps)
        figures.append({"seconds": 1 / per_second, "free": 0 if simulated else free_memory()})
    early, late = figures
    text = (
        f"{early['seconds'] * 1e3:.3f} and {late['seconds'] * 1e3:.3f} ms, "
        f"memory {(early['free'] - late['free']) / 1e6:+.1f} MB"
    )
    report.add(f"a token at depth 1 and {plan.depth:,}", figures, text, "the same")


def scoring(report: Report, plan: Plan, model: Any, path: Path, text: Path | None) -> None:
    """Measure perplexity's inner loop, and compare losses with the CPU's on the same tokens."""
    import rwkv_cli

    many, few = plan.score
    ids = np.frombuffer(text.read_bytes(), np.uint8) if text else RNG.integers(0, plan.vocab, many + 1)
    ids = ids[: many + 1].astype(np.int64)
    model.losses(ids[:few], ids[1 : few + 1], model.new_state())
    per_second = rate(lambda: model.losses(ids[:-1], ids[1:], model.new_state()), len(ids) - 1, 1)
    report.add("ppl", per_second, f"{per_second:,.0f} tok/s")
    cpu = rwkv_cli.load(path)
    got, want = (m.losses(ids[:few], ids[1 : few + 1], m.new_state()).mean() for m in (model, cpu))
    report.add("ppl, NLL less the CPU's", float(got - want), f"{got - want:+.1e} of {want:.4f}", "within 1e-3")


def peers(report: Report, layers: int, width: int, ours: float) -> None:
    """Measure only the matrix products of a token, in PyTorch and fp16: a float model could reach no more."""
    if importlib.util.find_spec("torch") is None:
        report.add("PyTorch fp16", None, "not installed")
        return
    import torch

    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < layers * 12 * width * width * 2 + (1 << 30):
        report.add("PyTorch fp16", None, "finds no GPU with enough memory left")
        return
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    weights = [[torch.randn(s, device="cuda", dtype=torch.float16) for s in shapes] for _ in range(layers)]
    inputs = {n: torch.randn(1, n, device="cuda", dtype=torch.float16) for n in (width, 4 * width)}

    def step() -> None:
        for layer in weights:
            for weight in layer:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        torch.cuda.synchronize()

    step()
    theirs = rate(step, 1, 10)
    report.add("PyTorch fp16, products alone", theirs, f"{theirs:,.1f} tok/s, ours is {ours / theirs:.2f} ×")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes in numba's simulator")
    parser.add_argument("--json", type=Path, help="write the report here too")
    parser.add_argument("--text", type=Path, help="a text to score, byte by byte")
    parser.add_argument("--checkpoints", type=Path, help="a folder of checkpoints with goldens")
    parser.add_argument("--folder", type=Path, help="where to put models of up to 8 GB; default: a temporary one")
    options = parser.parse_args()
    plan = FULL
    if options.tiny:
        plan = TINY
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
        sys.setswitchinterval(5e-4)  # the simulator's threads wait for each other
        warnings.simplefilter("ignore")
    import numba

    from rwkv_cli import __version__
    from rwkv_cli.errors import DeviceError
    from rwkv_cli.kernels.devices import choose

    try:
        gpu = choose("cuda")
    except DeviceError as error:
        raise SystemExit(str(error)) from None
    report = Report()
    versions = {name: importlib.metadata.version(name) for name in ("numba-cuda", "cuda-bindings")}
    report.facts |= {"rwkv-cli": __version__, "numba": numba.__version__, **versions}
    report.add("GPU", gpu.describe(), gpu.describe())
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        correctness(report, plan, folder)
        if options.checkpoints:
            goldens(report, options.checkpoints, folder)
        speed(report, plan, folder, options.text, options.tiny)
    wide = max(len(what) for what, _, _ in report.rows)
    print()
    for what, text, aim in report.rows:
        print(f"{what.ljust(wide)}  {text}{f'   [{aim}]' if aim else ''}")
    print(json.dumps(report.facts))
    if options.json:
        options.json.write_text(json.dumps(report.facts, indent=1))
    if report.wrong:
        raise SystemExit(f"not right: {', '.join(report.wrong)}")


if __name__ == "__main__":
    main()
