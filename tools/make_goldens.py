"""Write tests/goldens.json: what the references give for tiny random models. Needs the extra `reference`.

    python tools/make_goldens.py RWKV-LM

RWKV-LM is a clone of BlinkDL/RWKV-LM. Its demos are the reference for RWKV-7a and RWKV-8 rc00.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import naive  # noqa: E402
import tiny  # noqa: E402

SIZES = {"layers": 3, "width": 192, "head": 64, "vocab": 300, "ffn": 224, "seed": 11}


def main(rwkv_lm: str) -> None:
    """Run the reference on one model a version."""
    goldens = {}
    for version in tiny.VERSIONS:
        ids = [0, *np.random.default_rng(5).integers(0, SIZES["vocab"], 48).tolist()]
        with tempfile.TemporaryDirectory() as folder:
            model, text, out = (Path(folder) / name for name in ("model.pth", "ids.json", "out.npy"))
            tiny.write_pth(model, tiny.weights(version, **SIZES), "F32")
            text.write_text(json.dumps(ids))
            script = ROOT / "tests" / "run_reference.py"
            subprocess.run([sys.executable, script, version, model, text, out, rwkv_lm], check=True)
            logits = np.load(out)
        loss = -naive.log_softmax(logits[:-1].astype(np.float64))[np.arange(len(ids) - 1), ids[1:]]
        goldens[version] = {
            "sizes": SIZES,
            "ids": ids,
            "logits": [float(f"{x:.8g}") for x in logits[-2]],
            "nll_sum": float(loss.sum()),
        }
    (ROOT / "tests" / "goldens.json").write_text(json.dumps(goldens) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
