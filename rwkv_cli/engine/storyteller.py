"""The bundled model: a small RWKV-7 that tells stories (docs/demo-model.md), converted the first time it is used."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from rwkv_cli.engine.bars import Bars
from rwkv_cli.engine.conversion import Conversion
from rwkv_cli.kernels.cache import cache_folder
from rwkv_cli.kernels.contract import Loadable
from rwkv_cli.quant import replacing
from rwkv_cli.quant.header import FORMAT_VERSION

SOURCE = Path(__file__).parent.parent / "storyteller.pth"
TOKENIZER = SOURCE.with_name("storyteller.tokenizer.json")


def storyteller(bar: Bars, load_kernels: Callable[[list[Loadable]], object]) -> Path:
    """The converted file. It lies in the user's cache folder, beside the kernels that it was quantized with."""
    digest = hashlib.sha256(f"{FORMAT_VERSION}".encode())
    for file in (SOURCE, TOKENIZER):
        digest.update(file.read_bytes())
    path = cache_folder() / digest.hexdigest()[:16] / "storyteller.int8.safetensors"
    checksum = path.with_suffix(".sha256")
    if not (path.exists() and checksum.exists() and checksum.read_bytes() == _digest(path)):
        path.parent.mkdir(exist_ok=True)
        conversion = Conversion.of(SOURCE, "int8")
        load_kernels(conversion.kernels)
        conversion.write(path, overwrite=True, bar=bar)
        with replacing(checksum) as out:
            out.write(_digest(path))
    return path


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
