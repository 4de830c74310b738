"""How far llama.cpp's formats are from its own float32 on a text: the figures that benchmarks/accuracy.py prints of us.

    python benchmarks/accuracy.py CHECKPOINT TEXT --llama PYTHON

PYTHON is one that has llama-cpp-python (pip install llama-cpp-python; it builds for some ten minutes). An RWKV-7
checkpoint becomes a GGUF file in float32, which llama.cpp rounds to each format. All read the same tokens, in one
state. Bits are those of the whole file a weight, and the file is almost all weights.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from rwkv_cli.models import Config
from rwkv_cli.models.naming import official
from rwkv_cli.quant import open_source

FORMATS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")

MEASURE = """
import json, sys
import numpy as np, llama_cpp
exact, rounded, name, ids = *sys.argv[1:4], json.load(sys.stdin)
how = llama_cpp.llama_model_quantize_default_params()
how.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + name)
assert llama_cpp.llama_model_quantize(exact.encode(), rounded.encode(), how) == 0
models = [llama_cpp.Llama(path, n_ctx=4096, n_batch=512, n_ubatch=512, verbose=False) for path in (exact, rounded)]
batch = llama_cpp.llama_batch_init(512, 0, 1)
def log_probabilities(model, at, tokens):
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, at + i, 1, 0, 1
    assert llama_cpp.llama_decode(model._ctx.ctx, batch) == 0
    logits = llama_cpp.llama_get_logits(model._ctx.ctx)
    x = np.ctypeslib.as_array(logits, (len(tokens), model.n_vocab())).astype(np.float64)
    x -= x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))
kl, nll, same = [], [], []
for at in range(0, len(ids) - 1, 512):
    tokens, targets = ids[at : at + 512][: len(ids) - 1 - at], ids[at + 1 : at + 513]
    p, q = (log_probabilities(model, at, tokens) for model in models)
    kl.append((np.exp(p) * (p - q)).sum(1))
    nll.append([-x[range(len(targets)), targets] for x in (p, q)])
    same.append(p.argmax(1) == q.argmax(1))
exact, rounded = np.concatenate(nll, 1).mean(1)
kl, same = np.concatenate(kl), np.concatenate(same)
print(json.dumps({
    "version": llama_cpp.__version__, "tokens": len(kl), "ppl": float(np.exp(rounded)), "exact": float(np.exp(exact)),
    "kl": float(kl.mean()), "high": float(np.quantile(kl, 0.999)), "same": float(same.mean()),
}))
"""


def tensors_of(checkpoint: Path) -> dict[str, NDArray[np.float32]]:
    """The float32 tensors of an RWKV-7, as llama.cpp's conversion/rwkv.py names and turns them."""
    weights = {name: tensor.float32() for name, tensor in official(open_source(checkpoint)).items()}
    out = {"token_embd.weight": weights["emb.weight"], "output.weight": weights["head.weight"]}
    for part in ("weight", "bias"):
        out[f"token_embd_norm.{part}"] = weights[f"blocks.0.ln0.{part}"]
        out[f"output_norm.{part}"] = weights[f"ln_out.{part}"]
    for i in range(sum(name.endswith(".ln1.weight") for name in weights)):
        block, att, ffn = f"blk.{i}.", f"blocks.{i}.att.", f"blocks.{i}.ffn."
        for part in ("weight", "bias"):
            out[f"{block}attn_norm.{part}"] = weights[f"blocks.{i}.ln1.{part}"]
            out[f"{block}attn_norm_2.{part}"] = weights[f"blocks.{i}.ln2.{part}"]
            out[f"{block}time_mix_ln.{part}"] = weights[f"{att}ln_x.{part}"]
        mixes = [weights[f"{att}x_{x}"].reshape(1, 1, -1) for x in "rwkvag"]
        out[f"{block}time_mix_lerp_fused.weight"] = np.stack(mixes)
        for x in ("w", "a", "v", "g"):
            stem = att + ("a" if i == 0 and x == "v" else x)  # layer 0 has a dummy there
            for n in "12" if x == "g" else "012":
                weight = weights[stem + n]
                out[f"{block}time_mix_{x}{n}.weight"] = weight.reshape(-1) if n == "0" else weight.T
        for x in ("k_k", "k_a", "r_k"):
            out[f"{block}time_mix_{x}.weight"] = weights[att + x].reshape(-1)
        for x in ("receptance", "key", "value", "output"):
            out[f"{block}time_mix_{x}.weight"] = weights[f"{att}{x}.weight"]
        out[f"{block}channel_mix_lerp_k.weight"] = weights[f"{ffn}x_k"].reshape(1, 1, -1)
        for x in ("key", "value"):
            out[f"{block}channel_mix_{x}.weight"] = weights[f"{ffn}{x}.weight"]
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def write_gguf(checkpoint: Path, config: Config, target: Path) -> None:
    """A GGUF file of an RWKV-7 in float32. Its tokens are only numbered, since it reads ids."""
    writer = gguf.GGUFWriter(target, "rwkv7")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(0)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_wkv_head_size(config.head_size)
    writer.add_decay_lora_rank(config.ranks["w"])
    writer.add_iclr_lora_rank(config.ranks["a"])
    writer.add_value_residual_mix_lora_rank(config.ranks["v"])
    writer.add_gate_lora_rank(config.ranks["g"])
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([f"t{i}" for i in range(config.vocab)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab)
    for name, array in tensors_of(checkpoint).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(python: str, checkpoint: Path, config: Config, ids: Sequence[int]) -> Iterator[str]:
    """A line for each format of llama.cpp. `ids` are the tokens of the text, and the first is only read."""
    with tempfile.TemporaryDirectory() as folder:
        exact, rounded = Path(folder, "f32.gguf"), Path(folder, "rounded.gguf")
        write_gguf(checkpoint, config, exact)
        weights = sum(array.size for array in tensors_of(checkpoint).values())
        for name in FORMATS:
            done = subprocess.run(
                [python, "-P", "-c", MEASURE, str(exact), str(rounded), name],
                input=json.dumps(list(ids)),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                check=True,
            )
            s = json.loads(done.stdout)
            bits = 8 * rounded.stat().st_size / weights
            yield (
                f"llama.cpp's {name} (llama-cpp-python {s['version']}) bits {bits:.2f}  tokens {s['tokens']}  "
                f"ppl {s['ppl']:.4f} ({100 * (s['ppl'] / s['exact'] - 1):+.4f} %)  "
                f"KL {s['kl']:.3e}  99.9 % {s['high']:.3e}  top-1 {100 * s['same']:.3f} %"
            )
