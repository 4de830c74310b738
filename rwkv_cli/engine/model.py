"""A model with its tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.json_tokenizer import JsonTokenizer
from rwkv_cli.engine.recipes import is_known
from rwkv_cli.engine.stored import StoredTemplate
from rwkv_cli.engine.tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer, WorldTokenizer
from rwkv_cli.errors import FormatError, TokenizerError
from rwkv_cli.models import Model
from rwkv_cli.quant import Checkpoint


class LanguageModel(Model):
    """A model with its tokenizer (None if conversion found none) and its chat template."""

    tokenizer: Tokenizer | None

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "cpu",
        threads: int | None = None,
        on_load: Callable[[int], object] | None = None,
    ) -> None:
        super().__init__(checkpoint, device, threads, on_load)
        self.path = checkpoint.path
        self.tokenizer = read_tokenizer(checkpoint)
        if self.tokenizer is not None and self.tokenizer.size > self.config.vocab:
            raise FormatError(f"{self.path}: its tokenizer has more tokens than the model; convert it again")
        self.template = StoredTemplate.of(checkpoint)
        self.ends = _ends(checkpoint, self.config.vocab)
        """The tokens that end a text."""
        self.quantization: str = checkpoint.metadata("quantization", str)
        if not is_known(self.quantization):
            raise FormatError(
                f"{self.path}: is quantized as {self.quantization[:40]!r}, which is unknown; upgrade rwkv-cli"
            )

    @classmethod
    def load(
        cls, path: Path, device: str = "cpu", threads: int | None = None, on_load: Callable[[int], object] | None = None
    ) -> "LanguageModel":
        """Map a converted file, and copy its weights if the device is not the CPU."""
        return cls(Checkpoint(path), device, threads, on_load)

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer of a model that has one. Raises TokenizerError otherwise."""
        if self.tokenizer is None:
            raise no_tokenizer(self.path)
        return self.tokenizer


def no_tokenizer(path: Path) -> TokenizerError:
    """Return the error that a model has no tokenizer where a text has to be read."""
    return TokenizerError(f"{path}: has no tokenizer, so it cannot read text; convert it again with --tokenizer PATH")


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """Read the tokenizer inside a converted file, None if it has none."""
    kind = checkpoint.metadata("tokenizer", str)
    try:
        if kind == "none":
            return None
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "world":
            return WorldTokenizer.from_arrays(
                checkpoint.array("tokenizer.bytes"), checkpoint.array("tokenizer.lengths")
            )
        if kind == "json":
            return JsonTokenizer(checkpoint.array("tokenizer.json").tobytes(), "tokenizer.json", str(checkpoint.path))
    except TokenizerError as error:
        raise FormatError(f"{checkpoint.path}: its tokenizer is damaged ({error}); convert the model again") from None
    raise FormatError(f"{checkpoint.path}: has a tokenizer of unknown kind {kind!r}; upgrade rwkv-cli")


def _ends(checkpoint: Checkpoint, vocab: int) -> tuple[int, ...]:
    """The tokens that end a text. Files that do not name them have the official one."""
    ends = checkpoint.metadata("ends", list, [END_OF_TEXT])
    if any(type(token) is not int or not 0 <= token < vocab for token in ends):
        raise FormatError(f"{checkpoint.path}: its end tokens are damaged; convert the model again")
    return tuple(ends)


def obey(_read: int) -> None:
    """Let Ctrl-C come while tokens are read: a pass that is watched by this pauses several times a second."""


def check_finite(model: LanguageModel, values: NDArray[np.floating[Any]]) -> None:
    """Raise FormatError where a model's output, or a number computed from it, is not finite."""
    if not np.isfinite(values).all():
        raise FormatError(f"{model.path}: the model's output is not finite; convert it again from a sound file")
