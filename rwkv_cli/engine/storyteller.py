"""The bundled model: a small RWKV-7 that tells stories (docs/demo-model.md), converted the first time it is used."""

import hashlib
from pathlib import Path

from rwkv_cli.kernels.cache import cache_folder
from rwkv_cli.quant.checkpoint import FORMAT_VERSION

SOURCE = Path(__file__).parent.parent / "storyteller.pth"
TOKENIZER = SOURCE.with_name("storyteller.tokenizer.json")


def storyteller() -> Path:
    """The converted file in the user's cache folder, beside the kernels that it was quantized with."""
    from rwkv_cli.commands.convert import Conversion

    digest = hashlib.sha256(f"{FORMAT_VERSION}".encode())
    for file in (SOURCE, TOKENIZER):
        digest.update(file.read_bytes())
    path = cache_folder() / digest.hexdigest()[:16] / "storyteller.int8.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        Conversion.of(SOURCE, "int8").write(path, overwrite=True)
    return path
