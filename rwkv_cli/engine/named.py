"""The model that a word stands for: a path, a name in the models folder, or a checkpoint that is converted once.

What converts is imported when it is needed: it loads numba, and most models are converted already.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_cli.engine import library
from rwkv_cli.errors import ModelNameError, NotConvertedError
from rwkv_cli.quant import Checkpoint

if TYPE_CHECKING:
    from rwkv_cli.engine.bars import Bars
    from rwkv_cli.kernels.contract import Loadable

    LoadKernels = Callable[[list[Loadable]], object]

STORYTELLER = "storyteller"
"""The word for the bundled model."""


def model_file(word: str, bar: Bars, load_kernels: LoadKernels, quantization: str | None = "int8") -> Path:
    """Return the converted file that a path, a name or the unique beginning of a name stands for.

    A checkpoint is converted into the models folder the first time, and whenever it has changed. `bar` shows how far
    that is, and `load_kernels` gets the kernels that it needs. With no quantization a checkpoint is refused. Raises an
    RwkvError or OSError that names what is wrong.
    """
    try:
        path = library.find(word)
    except ModelNameError:
        if word == STORYTELLER:
            from rwkv_cli.engine.storyteller import storyteller

            return storyteller(bar, load_kernels)
        raise
    try:
        Checkpoint(path)
    except NotConvertedError:
        if quantization is None:
            raise
        path = convert_into(path, library.Origin.of(path, quantization), bar, load_kernels)
    library.note_use(path)
    return path


def convert_into(source: Path, origin: library.Origin, bar: Bars, load_kernels: LoadKernels) -> Path:
    """Convert a checkpoint into the models folder, if that was not done before."""
    known = library.made_from(origin)
    if known is not None and library.is_current(known, origin):
        return known
    from rwkv_cli.engine.conversion import Conversion, default_destination

    conversion = Conversion.of(source, origin.quantization)
    with library.place(origin, default_destination(source, origin.quantization).name) as path:
        load_kernels(conversion.kernels)
        conversion.write(path, overwrite=True, bar=bar)
    return path
