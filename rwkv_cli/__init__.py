"""Quantized local inference of RWKV language models.

import rwkv_cli
model = rwkv_cli.load("model.safetensors")
logits, state = model.forward(model.tokenizer.encode("Once upon a time"))
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rwkv_cli.engine.model import LanguageModel

# In a source tree, kernels, models and quant lie beside this folder. Python started there finds this folder first.
_here = Path(__file__).parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path: str | Path, device: str = "cpu", threads: int | None = None) -> LanguageModel:
    """Load a converted model (written by `rwkv convert`), memory-mapped.

    The model has `forward(ids, state=None, all_logits=False) -> (logits, state)` with float32 logits `[V]` or `[T, V]`,
    `new_state()`, `config`, and `tokenizer` with `encode` and `decode` (None if conversion found none). `state` is
    not changed; it has `clone()` and `save(path)`. `threads` defaults to all cores.

    Kernels are loaded, too. If they have to be compiled, which takes about 10 seconds once, the logger "rwkv_cli" says
    so in a warning.

    Raises OSError, or a ValueError that says what is wrong with the file, the device or the number of threads.
    """
    from rwkv_cli.engine.model import LanguageModel
    from rwkv_cli.kernels.cache import on_first_compilation

    model = LanguageModel.load(Path(path), device, threads)
    log = logging.getLogger(__name__)
    with on_first_compilation(lambda: log.warning("Compiling kernels for this machine (only the first time) …")):
        model.prepare("last")
    return model
