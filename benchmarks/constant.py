"""Linear time and constant memory: RWKV-7 against a Transformer and Mamba of equal size, on one thread of this machine.

    python benchmarks/constant.py [--llama PYTHON] [--seconds S] [--depth N] [--draw docs/constant.svg]

All models have random weights in 8 bits: RWKV-7 here in int8; RWKV-7, a Transformer (Llama) and Mamba in llama.cpp with
Q8_0, if PYTHON has llama-cpp-python. Each has some 33 M parameters. At depths from 0 to N tokens, this measures how
long a token takes, how many bytes hold what was read, and how long reading up to there takes. Times are CPU seconds of
one thread. A model reads for S seconds at most (benchmarks/depth_llama.py says more).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import llama
import numpy as np
from depth import Row, measure
from numpy.typing import NDArray

from rwkv_cli.engine.model import LanguageModel

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import tiny

LAYERS, WIDTH, VOCAB, HEAD = 8, 512, 8192, 64
RNG = np.random.default_rng(0)
QUANTIZE = """
import sys, llama_cpp
how = llama_cpp.llama_model_quantize_default_params()
how.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), how) == 0
"""


def matrix(rows: int, columns: int) -> NDArray[np.float32]:
    """Random weights [rows, columns]."""
    return (RNG.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)


def ones(n: int) -> NDArray[np.float32]:
    """The weights of a norm."""
    return np.ones(n, np.float32)


def transformer() -> Iterator[tuple[str, NDArray[np.float32]]]:
    """A Llama's tensors; its channel mix has 3 matrices, so that they are narrower."""
    ffn = WIDTH * 8 // 3 // 32 * 32
    for i in range(LAYERS):
        block = f"blk.{i}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"{block}{name}.weight", matrix(WIDTH, WIDTH)
        for name in ("attn_norm", "ffn_norm"):
            yield f"{block}{name}.weight", ones(WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            yield f"{block}{name}.weight", matrix(ffn, WIDTH)
        yield f"{block}ffn_down.weight", matrix(WIDTH, ffn)


def mamba() -> Iterator[tuple[str, NDArray[np.float32]]]:
    """A Mamba's tensors. A layer has half the weights of a Transformer's, so that there are twice as many."""
    inner, rank = 2 * WIDTH, WIDTH // 16
    for i in range(2 * LAYERS):
        block = f"blk.{i}."
        yield f"{block}attn_norm.weight", ones(WIDTH)
        yield f"{block}ssm_in.weight", matrix(2 * inner, WIDTH)
        yield f"{block}ssm_conv1d.weight", matrix(inner, 4)
        yield f"{block}ssm_conv1d.bias", 0 * ones(inner)
        yield f"{block}ssm_x.weight", matrix(rank + 32, inner)
        yield f"{block}ssm_dt.weight", matrix(inner, rank)
        yield f"{block}ssm_dt.bias", 0 * ones(inner)
        yield f"{block}ssm_a", -np.tile(np.arange(1, 17, dtype=np.float32), (inner, 1))
        yield f"{block}ssm_d", ones(inner)
        yield f"{block}ssm_out.weight", matrix(WIDTH, inner)


def write(path: Path, arch: str, tensors: Iterator[tuple[str, NDArray[np.float32]]], blocks: int) -> None:
    """Write a GGUF file in float32. Its tokens are only numbered."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(blocks)
    writer.add_layer_norm_rms_eps(1e-5)
    if arch == "llama":
        writer.add_feed_forward_length(WIDTH * 8 // 3 // 32 * 32)
        writer.add_head_count(WIDTH // HEAD)
        writer.add_rope_dimension_count(HEAD)
    else:
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * WIDTH)
        writer.add_ssm_state_size(16)
        writer.add_ssm_time_step_rank(WIDTH // 16)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB)
    top = {"token_embd.weight": matrix(VOCAB, WIDTH), "output_norm.weight": ones(WIDTH)}
    for name, array in [*top.items(), ("output.weight", matrix(VOCAB, WIDTH)), *tensors]:
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Ours:
    """RWKV-7 as it runs here."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.state, self.depth = model, model.new_state(), 0
        model.prepare("last")

    def read(self, tokens: int) -> None:
        self.model.advance(np.random.default_rng(self.depth).integers(0, VOCAB, tokens), self.state)
        self.depth += tokens

    def memory(self) -> int:
        return sum(array.nbytes for array in self.state.arrays().values())

    def grow(self, _depth: int) -> bool:
        return False


def measure_all(python: str | None, seconds: float, depths: Sequence[int]) -> dict[str, list[Row]]:
    """Measure all models."""
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"layers": LAYERS, "width": WIDTH, "vocab": VOCAB, "head": HEAD, "ffn": 4 * WIDTH}
        source = tiny.write_pth(folder / "rwkv.pth", tiny.weights("7", **sizes), "F32")
        command = [sys.executable, "-P", "-m", "rwkv_cli", "convert", source, folder / "rwkv"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        model = LanguageModel.load(folder / "rwkv", threads=1)
        results["RWKV-7, rwkv int8"] = list(measure(Ours(model), seconds, depths))
        if python is None:
            return results
        exact, rounded = folder / "exact.gguf", folder / "rounded.gguf"
        for label, arch in (("Transformer", "llama"), ("Mamba", "mamba"), ("RWKV-7", "rwkv7")):
            if arch == "rwkv7":
                llama.write_gguf(source, model.config, exact)
            else:
                made, blocks = (transformer(), LAYERS) if arch == "llama" else (mamba(), 2 * LAYERS)
                write(exact, arch, made, blocks)
            for script in (["-c", QUANTIZE, exact, rounded],
                           [Path(__file__).with_name("depth_llama.py"), rounded, seconds, *depths]):  # fmt: skip
                command = [python, *map(str, script)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-2000:])
            results[f"{label}, llama.cpp Q8_0"] = [json.loads(line) for line in done.stdout.splitlines()]
    return results


def draw(path: Path, results: dict[str, list[Row]]) -> None:
    """Draw the three figures by depth."""
    import matplotlib.figure
    import matplotlib.style
    import matplotlib.ticker

    colours = {"RWKV-7, rwkv": "#0072b2", "RWKV-7, llama": "#56b4e9", "Transformer": "#d55e00", "Mamba": "#009e73"}
    with matplotlib.style.context(["default", {"svg.fonttype": "none", "font.size": 9}]):
        figure = matplotlib.figure.Figure((9.5, 3.4), layout="constrained")
        panels = figure.subplots(1, 3)
        labels = ("ms of CPU for the next token", "MB that hold what was read", "CPU seconds to read it")
        for axes, key, scale, label in zip(panels, ("token", "memory", "read"), (1e3, 1e-6, 1), labels, strict=True):
            for name, rows in results.items():
                points = [(row["depth"], scale * row[key]) for row in rows if row[key] is not None]
                colour = next(colour for start, colour in colours.items() if name.startswith(start))
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=name)
            axes.set_xlabel("tokens read before")
            axes.set_title(label, loc="left", fontsize=9.5)
            axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:.0f}k")
            axes.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(16384))
            axes.set_xlim(0)
            axes.set_ylim(0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e5e5e5", linewidth=0.7)
        lines, names = panels[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", metavar="PYTHON", help="a Python that has llama-cpp-python")
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds that each model reads for, at most")
    parser.add_argument("--depth", type=int, default=65536)
    parser.add_argument("--draw", type=Path, metavar="OUT")
    args = parser.parse_args()
    depths = [0, *(d for k in range(10, 40) if (d := 1 << k) <= args.depth)]
    results = measure_all(args.llama, args.seconds, depths)
    print(f"{'model':26} {'depth':>7} {'ms/token':>9} {'MB':>9} {'s to read':>10}")
    for name, rows in results.items():
        for row in rows:
            read = "" if row["read"] is None else f"{row['read']:.1f}"
            print(f"{name:26} {row['depth']:7} {1e3 * row['token']:9.2f} {row['memory'] / 1e6:9.2f} {read:>10}")
    if args.draw:
        draw(args.draw, results)


if __name__ == "__main__":
    main()
