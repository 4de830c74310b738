"""How far quantized models are from float on a text: this tool's formats against Q8_0, on the same weights.

    python benchmarks/accuracy.py CHECKPOINT TEXT [--limit N] [--pairs] [--ggml LIBRARY] [--llama PYTHON]

Q8_0 is llama.cpp's (ggml-quants.c, `quantize_row_q8_0_ref`): blocks of 32 with a float16 scale of absmax/127, matrices
and embedding but not the low-rank factors. Its weights are rounded here and run with float activations, which is more
than llama.cpp itself keeps. With `--ggml`, its own quantizer in that library (libggml-base.so of llama-cpp-python) also
rounds to Q6_K, Q5_K and Q4_K, and our formats come plain and calibrated. As there, the head is Q6_K, low-rank factors
stay (counted as 16 bits), and a width that is no multiple of 256 falls back: Q6_K to Q8_0, Q5_K to Q5_1, Q4_K to Q5_0.
With `--llama`, llama.cpp itself runs in some of its formats, too (benchmarks/llama.py).
Prints one line a scheme, as `rwkv ppl --compare` does.
"""

import argparse
import ctypes
import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.facts import describe
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.scoring import Scorer
from rwkv_cli.models.naming import official
from rwkv_cli.quant import Checkpoint, open_source


def q8_0(w: NDArray[np.float32]) -> NDArray[np.float32]:
    """A matrix [N, K] as Q8_0 keeps it; K is a multiple of 32."""
    blocks = w.reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    return (np.rint(blocks * inverse) * scale.astype(np.float16).astype(np.float32)).reshape(w.shape)


GGML = {
    "Q8_0": (8, "Q8_0"),
    "Q6_K": (14, "Q8_0"),
    "Q5_K": (13, "Q5_1"),
    "Q4_K": (12, "Q5_0"),
    "Q5_1": (7, ""),
    "Q5_0": (6, ""),
}
"""Types of ggml.h by their names: the number, and the type of a matrix whose width is no multiple of 256."""
K_QUANTS = ("Q6_K", "Q5_K", "Q4_K")

Rounded = tuple[NDArray[np.float32], float]
"""A matrix as a format keeps it, and the bits of one of its weights."""


def by_ggml(library: Path, type_name: str, name: str, w: NDArray[np.float32]) -> Rounded:
    """A matrix as ggml's own quantizer rounds it."""
    ggml, (rows, columns), floats = ctypes.CDLL(str(library)), w.shape, ctypes.POINTER(ctypes.c_float)
    type_name = "Q6_K" if name == "head.weight" else type_name
    if columns % 256 != 0:
        type_name = GGML[type_name][1]
    number = GGML[type_name][0]
    ggml.ggml_row_size.restype = ctypes.c_size_t
    stored = ctypes.create_string_buffer(rows * ggml.ggml_row_size(number, ctypes.c_int64(columns)))
    ggml.ggml_quantize_chunk(number, w.ctypes.data_as(floats), stored, *map(ctypes.c_int64, (0, rows, columns)), None)
    out = np.empty_like(w)
    read = getattr(ggml, f"dequantize_row_{type_name[0].lower()}{type_name[1:]}")
    read(stored, out.ctypes.data_as(floats), ctypes.c_int64(w.size))
    return out, len(stored) * 8 / w.size


def write_rounded(source: Path, target: Path, rounded: Callable[[str, NDArray[np.float32]], Rounded]) -> float:
    """A float32 safetensors file of the checkpoint with its matrices rounded. Returns the bits of all, a weight."""
    from safetensors.numpy import save_file

    tensors, bits = {}, 0.0
    for name, tensor in official(open_source(source)).items():
        w = tensor.float32()
        each = 16.0 if w.ndim == 2 and min(w.shape) > 1 else 32.0
        if name.endswith(".weight") and w.ndim == 2:
            w, each = rounded(name, w)
        tensors[name], bits = w, bits + each * w.size
    save_file(tensors, target)
    return bits / sum(w.size for w in tensors.values())


class _Bytes(Scorer):
    """A scorer that takes bytes as they are. Pairs of b and 0 would be refused as UTF-16."""

    def _blocks(self, stream: BinaryIO) -> Iterator[bytes]:
        yield stream.read()


def main() -> None:
    """Convert three ways, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--pairs", action="store_true", help="feed each byte b as b, 0 (16-bit models over bytes)")
    parser.add_argument("--ggml", type=Path, metavar="LIBRARY", help="libggml-base.so, for K-quants")
    parser.add_argument("--llama", metavar="PYTHON", help="a Python that has llama-cpp-python (RWKV-7)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bits, sources = {}, {}
        rules: dict[str, Callable[[str, NDArray[np.float32]], Rounded]] = {"Q8_0": lambda _, w: (q8_0(w), 8.5)}
        if args.ggml:
            rules |= {label: functools.partial(by_ggml, args.ggml, label) for label in K_QUANTS}
        for label, rule in rules.items():
            sources[label] = folder / f"{label}.source.safetensors"
            bits[label] = write_rounded(args.checkpoint, sources[label], rule)
        beside = [args.checkpoint.with_suffix(".tokenizer.json"), args.checkpoint.parent / "tokenizer.json"]
        found = next((str(file) for file in beside if file.is_file()), "auto")
        schemes = [("float", args.checkpoint, "none", ())]
        schemes += [(label, source, "none", ()) for label, source in sources.items()]
        for quant in ("int8", "q6", "q5", "q4"):
            schemes.append((quant, args.checkpoint, quant, ()))
            if args.ggml:
                other = ("calibrated", "self") if quant == "int8" else ("plain", "none")
                schemes.append((f"{quant} {other[0]}", args.checkpoint, quant, ("--calibrate", other[1])))
        for label, source, quant, more in schemes:
            command = [sys.executable, "-P", "-m", "rwkv_cli", "convert", source, folder / label]
            command += ["--quant", quant, "--tokenizer", found, *more]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        text = args.text
        if args.pairs:
            text = folder / "pairs"
            text.write_bytes(bytes(x for b in args.text.read_bytes()[: args.limit] for x in (b, 0)))
        reference = LanguageModel.load(folder / "float")
        for label, *_ in schemes[1:]:
            model = LanguageModel.load(folder / label)
            limit = None if args.pairs else args.limit
            scorer = (_Bytes if args.pairs else Scorer)(model, reference, start_token=0, limit=limit)
            s = scorer.score(text, lambda *_: None)
            c, facts = s.comparison, describe(Checkpoint(folder / label))
            assert c is not None
            print(
                f"{label:15} bits {bits.get(label, facts['bits_per_weight']):.2f}  tokens {s.tokens}  "
                f"ppl {s.ppl:.4f} ({100 * (s.ppl / c.other_ppl - 1):+.4f} %)  "
                f"KL {c.kl_mean:.3e}  99.9 % {c.kl_p999:.3e}  top-1 {100 * c.top1_agreement:.3f} %",
                flush=True,
            )
        if args.llama:
            import llama

            ids = reference.text_tokenizer.encode(text.read_bytes())[:limit]
            for line in llama.measure(args.llama, args.checkpoint, reference.config, [0, *ids]):
                print(line, flush=True)


if __name__ == "__main__":
    main()
