"""Start-up, depth and conversion, as whole commands or processes.

    python benchmarks/commands.py startup MODEL.safetensors
    python benchmarks/commands.py depth MODEL.safetensors [--depths 1 1000 10000 100000]
    python benchmarks/commands.py convert MODEL.pth [-r 5]
    python benchmarks/commands.py loop MODEL.safetensors [--depths 1 1000 10000 100000]

startup: `rwkv --help`, and the first token of a model from the shell with kernels and file in their caches, and once
with no kernel compiled. depth: time and memory of a token behind so many others. convert: against copying the same
file, both synced, in pairs. loop: time of a token beside the model's pass, with penalties and stop texts, behind so
many others; it fails if the last costs half as much again as the first.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RWKV = [sys.executable, "-P", "-m", "rwkv_cli"]


def seconds(command: list[str], **env: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **env})
    return time.perf_counter() - start


def startup(model: Path, repetitions: int) -> None:
    """Medians; the model's tokenizer is not needed, so any converted file will do."""
    script = str(Path(sys.executable).parent / "rwkv")
    print(f"rwkv --help: {statistics.median(seconds([script, '--help']) for _ in range(2 * repetitions)):.3f} s")
    code = "import sys, rwkv_cli; m = rwkv_cli.load(sys.argv[1]); m.advance([0], m.new_state())"
    first = [sys.executable, "-P", "-c", code, str(model)]
    with tempfile.TemporaryDirectory() as folder:
        print(f"first token, nothing compiled: {seconds(first, NUMBA_CACHE_DIR=folder):.1f} s")
        warm = statistics.median(seconds(first, NUMBA_CACHE_DIR=folder) for _ in range(repetitions))
    print(f"first token, everything in its cache: {warm:.2f} s")


def depth(path: Path, depths: list[int], repetitions: int) -> None:
    import rwkv_cli

    model = rwkv_cli.load(path)
    rng, read = np.random.default_rng(0), 0
    state, twin = model.new_state(), model.new_state()
    ids = rng.integers(1, model.config.vocab - 1, 32)
    together = model.advance(ids, state)
    alone = [model.advance([token], twin) for token in ids][-1]
    assert np.array_equal(together, alone), "one token and many differ; no figure is worth anything"
    for target in depths:
        while read < target:
            model.advance(rng.integers(1, model.config.vocab - 1, model.backend.chunk), state)
            read += model.backend.chunk
        rates = []
        for _ in range(repetitions):
            start = time.perf_counter()
            for token in ids:
                model.advance([token], state)
            rates.append(len(ids) / (time.perf_counter() - start))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(
            f"behind {read:7} tokens: {statistics.median(rates):7.1f} tokens per second, {memory:,.0f} MB", flush=True
        )


def loop(path: Path, depths: list[int]) -> None:
    import rwkv_cli
    from rwkv_cli.engine.completion import Completion, Request, new_sampler
    from rwkv_cli.engine.sampling import Sampling

    model = rwkv_cli.load(path)
    rng = np.random.default_rng(0)
    vocab = model.config.vocab
    twice = np.tile(rng.standard_normal(vocab).astype(np.float32) * 6, 2)

    def logits(made: int) -> NDArray[np.float32]:
        """A turn of the same numbers, so that the likeliest token is another each time."""
        start = made * 7919 % vocab
        return twice[start : start + vocab]

    request = Request([1], max(depths) + 1000, ("\n\nUser:", "never there"), ignore_eos=True)
    # The likeliest is taken, since the time of a wider choice depends on the logits. Penalties change it.
    completion = Completion(
        model, model.new_state(), new_sampler(model, Sampling(top_k=1, presence_penalty=2), 1), request
    )
    steps, made, figures = completion.steps(), 0, []
    next(steps)
    for target in depths:
        while made < target:
            steps.send(logits(made))
            made += 1
        start = time.perf_counter()
        for _ in range(500):
            steps.send(logits(made))
            made += 1
        figures.append((time.perf_counter() - start) / 500 * 1e6)
        different = len(completion.sampler.counts)
        print(f"behind {target:9,} tokens, {different:6,} of them different: {figures[-1]:7.1f} µs", flush=True)
    assert figures[-1] < 1.5 * figures[0], "the cost of a token grows with the text"


def convert(source: Path, repetitions: int) -> None:
    size, pairs = source.stat().st_size, []
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        out, copied = Path(folder) / "model.safetensors", Path(folder) / "copy"
        peak = 0
        for _ in range(repetitions):
            start = time.perf_counter()
            process = subprocess.Popen([*RWKV, "convert", source, out, "--force"], stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
            assert status == 0
            own, peak = time.perf_counter() - start, max(peak, usage.ru_maxrss)
            start = time.perf_counter()
            with source.open("rb") as file, copied.open("wb") as other:
                shutil.copyfileobj(file, other, 16 << 20)
                other.flush()
                os.fsync(other.fileno())
            pairs.append((own, time.perf_counter() - start))
    own, copy = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"{source.name}, {size / 1e9:.2f} GB: convert {own:.2f} s, copy {copy:.2f} s: {ratio:.2f} of its rate; "
          f"peak memory {peak / 1e3:,.0f} MB")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["startup", "depth", "convert", "loop"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 1000, 10_000, 100_000])
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    options = parser.parse_args()
    if options.what == "startup":
        startup(options.file, options.repetitions)
    elif options.what == "depth":
        depth(options.file, options.depths, options.repetitions)
    elif options.what == "loop":
        loop(options.file, options.depths)
    else:
        convert(options.file, options.repetitions)


if __name__ == "__main__":
    main()
