"""How far quantized models are from float on a text: this tool's formats against Q8_0, on the same weights.

    python benchmarks/accuracy.py CHECKPOINT TEXT [--limit N] [--pairs] [--llama PYTHON]

Q8_0 is llama.cpp's (ggml-quants.c, `quantize_row_q8_0_ref`): blocks of 32 with a float16 scale of absmax/127, matrices
and embedding but not the low-rank factors. Its weights are rounded here and run with float activations, which is more
than llama.cpp itself keeps. With `--llama`, llama.cpp itself runs in some of its formats, too (benchmarks/llama.py).
Prints one line a scheme, as `rwkv ppl --compare` does.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

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


def write_q8_0(source: Path, target: Path) -> None:
    """A float32 safetensors file of the checkpoint with its matrices rounded."""
    from safetensors.numpy import save_file

    tensors = {}
    for name, tensor in official(open_source(source)).items():
        w = tensor.float32()
        matrix = name.endswith(".weight") and w.ndim == 2
        tensors[name] = q8_0(w) if matrix else w
    save_file(tensors, target)


def main() -> None:
    """Convert three ways, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--pairs", action="store_true", help="feed each byte b as b, 0 (16-bit models over bytes)")
    parser.add_argument("--llama", metavar="PYTHON", help="a Python that has llama-cpp-python (RWKV-7)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rounded = folder / "q8_0.source.safetensors"
        write_q8_0(args.checkpoint, rounded)
        beside = [args.checkpoint.with_suffix(".tokenizer.json"), args.checkpoint.parent / "tokenizer.json"]
        found = next((str(file) for file in beside if file.is_file()), "auto")
        for label, source, quant in [
            ("float", args.checkpoint, "none"), ("Q8_0", rounded, "none"),
            *((quant, args.checkpoint, quant) for quant in ("int8", "q6", "q5", "q4")),
        ]:  # fmt: skip
            command = [sys.executable, "-P", "-m", "rwkv_cli", "convert", source, folder / label]
            command += ["--quant", quant, "--tokenizer", found]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        text = args.text
        if args.pairs:
            text = folder / "pairs"
            text.write_bytes(bytes(x for b in args.text.read_bytes()[: args.limit] for x in (b, 0)))
        reference = LanguageModel.load(folder / "float")
        for label in ("Q8_0", "int8", "q6", "q5", "q4"):
            model = LanguageModel.load(folder / label)
            limit = None if args.pairs else args.limit
            s = Scorer(model, reference, start_token=0, limit=limit).score(text, lambda *_: None)
            c, facts = s.comparison, describe(Checkpoint(folder / label))
            assert c is not None
            bits = facts["bits_per_weight"]
            print(
                f"{label:5} bits {bits:.2f}  tokens {s.tokens}  "
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
