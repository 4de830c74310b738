"""Conversion of a released checkpoint into one file that everything else runs."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.engine.bars import WRITING, Bars, no_bars
from rwkv_cli.engine.calibration import (
    Calibrated,
    Text,
    facts,
    first_token,
    own_text,
    read_text,
)
from rwkv_cli.engine.inside import check_kind, template_inside, tokenizer_inside
from rwkv_cli.engine.json_tokenizer import JsonTokenizer
from rwkv_cli.engine.keeping import Kept, judge, keep
from rwkv_cli.engine.mixture import check_bits, mixed, with_lowest
from rwkv_cli.engine.recipes import LADDER, RECIPES, mixture_name
from rwkv_cli.engine.rounding import ROUNDING_KERNELS, Judgement, Loss, Plain, judge_embedding
from rwkv_cli.engine.stored import template_beside
from rwkv_cli.engine.templates import recognize
from rwkv_cli.engine.tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer, WorldTokenizer, official_vocabulary
from rwkv_cli.errors import FormatError, TokenizerError, UnsupportedModelError
from rwkv_cli.kernels.contract import Loadable
from rwkv_cli.kernels.cpu.feed import KERNELS as FEEDBACK
from rwkv_cli.kernels.cpu.gram import KERNELS as PRODUCTS
from rwkv_cli.models import Config, Model, registry
from rwkv_cli.models.adapters import Adapter, read_adapters
from rwkv_cli.models.config import Entry
from rwkv_cli.models.huggingface import check_unquantized
from rwkv_cli.quant import SourceTensor, check_regular, open_source, read_settings
from rwkv_cli.quant.formats import FORMATS, layout_for
from rwkv_cli.quant.formats import float as floats
from rwkv_cli.quant.unconverted import Unconverted
from rwkv_cli.quant.writer import Contents, Planned, Written, write

ENDINGS = {".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".st", ".gguf", ".ggml"}
"""Endings of checkpoints' and adapters' names."""

TOKENS = 4800
"""Tokens of a text to calibrate on. Twice as many gain nothing measurable (docs/quantization.md)."""

CALIBRATED = {"int8": "none", "q6": "self", "q5": "self", "q4": "self", "none": "none"}
"""The text that a format is calibrated on unless one says otherwise."""


@dataclass(frozen=True)
class Converted:
    """The outcome of a conversion."""

    contents: Contents
    written: Sequence[Written]
    spoilt: Judgement | None
    """The error that rounding would have done to the embedding, if it was kept from it."""
    kept: Sequence[Kept]
    """The matrices that have more bits than they were to have."""
    text: Text | None
    loss: Loss | None
    """The cost of quantizing on a part of the text, if there is one."""


@dataclass(frozen=True)
class Conversion:
    """A checkpoint that was checked, and what is to become of it."""

    config: Config
    contents: Contents
    adapters: Sequence[Adapter]
    tokenizer: Tokenizer | None
    calibrate: str
    """The text to calibrate on: `self`, `none` or the name of a file."""
    bits: float | None = None
    """The most bits a weight that a mixture of formats may have, if it is to be one."""

    @classmethod
    def of(
        cls,
        src: Path,
        quantization: str,
        tokenizer: str = "auto",
        template: str = "auto",
        *,
        eos: int | None = None,
        adapters: Sequence[Path] = (),
        scale: float | None = None,
    ) -> Conversion:
        """Plan a conversion, without reading a weight.

        `quantization` is a key of FORMATS, `tokenizer` is auto, world or a file, and `template` is auto or a template's
        name. `eos` is the token that ends a text; None takes what the source says. `adapters` are files to merge, and
        `scale` is that of LoRA; None takes what the files say. Raises an RwkvError where a file does not do, and
        OSError.
        """
        found_adapters = read_adapters(adapters, scale)
        try:
            settings = read_settings(src)
            check_unquantized(settings)
            source = open_source(src)
            config, tensors = registry.recognize(source, settings, found_adapters)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{src}: {error}") from None
        recipe = RECIPES[quantization]
        plan = [_planned(name, *matched, recipe.format_of(name)) for name, matched in tensors.items()]
        found = find_tokenizer(tokenizer, src, config.vocab, settings)
        kind, arrays = _stored_tokenizer(found)
        name = full_path(src).name
        metadata: dict[str, Any] = {
            "config": config.as_json(),
            "quantization": quantization,
            "tokenizer": kind,
            **_stored_template(template, src, settings, kind, config.vocab),
            "source": name,
        }
        stated = settings.get("eos_token_id", settings.get("tokenizer.ggml.eos_token_id"))
        ends = _ends(eos, stated, found, config.vocab)
        if ends != [END_OF_TEXT]:
            metadata["ends"] = ends
        if found_adapters:
            metadata["adapters"] = [str(adapter) for adapter in found_adapters]
        return cls(config, Contents(plan, metadata, arrays), found_adapters, found, CALIBRATED[quantization])

    def calibrated(self, on: str) -> Conversion:
        """The conversion with another thing to calibrate on: `self`, `none` or the name of a text.

        Raises FormatError for what does not go with the formats, and OSError for a text that is not there.
        """
        if on != "none" and self.contents.metadata["quantization"] == "none":
            raise FormatError(f"--calibrate {on}: with --quant none there is nothing to round; leave one of them out")
        if on == "none" and self.bits is not None:
            raise FormatError("--calibrate none: --bits tells by a text which weights need more; leave one of them out")
        if on not in ("self", "none"):
            Path(on).stat()
        return replace(self, calibrate=on)

    def within(self, bits: float) -> Conversion:
        """The conversion of an int8 file as one of at most so many bits a weight, each kind of tensors in its format.

        Raises FormatError for a number that the formats cannot meet.
        """
        check_bits(self.contents, bits)
        metadata = {**self.contents.metadata, "quantization": mixture_name(bits)}
        return replace(self, contents=replace(self.contents, metadata=metadata), calibrate="self", bits=bits)

    @functools.cached_property
    def source_model(self) -> Model:
        """The model with the source's own values, on the CPU."""
        return Model(Unconverted(self.contents))

    @property
    def kernels(self) -> list[Loadable]:
        """The kernels that `write` needs."""
        formats = {planned.format.NAME for planned in self.contents.plan}
        if self.calibrate != "none":
            formats |= set(LADDER) if self.bits else {"int8"}  # what is kept gets int8
        names = sorted(formats)
        kernels = [kernel for name in names for kernel in ROUNDING_KERNELS.get(name, ())]
        if self.calibrate != "none":
            kernels += [*FEEDBACK, *PRODUCTS, *self.source_model.kernels("last", "every")]
        return list(dict.fromkeys(kernels))

    def write(self, dst: Path, *, overwrite: bool, bar: Bars = no_bars) -> Converted:
        """Write `dst`. A failure leaves nothing behind."""
        contents = self.contents
        judgement = judge_embedding(contents.plan, self.config)
        spoilt = judgement if judgement is not None and judgement.spoilt else None
        if spoilt:
            whole = floats.LAYOUTS["table"]
            plan = [replace(p, layout=whole, kept=True) if p.name == "emb.weight" else p for p in contents.plan]
            contents = replace(contents, plan=plan)
        text = self._text(bar) if self.calibrate != "none" else None
        kept: Sequence[Kept] = []
        if text is not None:
            coarsest = contents if self.bits is None else with_lowest(contents)
            kept = judge(coarsest.plan, self.source_model, text.learned, bar)
            contents = keep(contents, kept)
            if self.bits is not None:
                contents = mixed(contents, self.bits, self.source_model, text.learned, bar)
        names = [planned.name for planned in contents.plan if planned.kept]
        if names:
            contents = replace(contents, metadata={**contents.metadata, "kept": names})
        embedding = judge_embedding(contents.plan, self.config)
        effects = {} if embedding is None else {"emb.weight": embedding.after_norm}
        rounding: Plain = Plain(effects)
        if text is not None:
            rounding = Calibrated(self.source_model, text, effects, bar)
            contents = replace(contents, metadata={**contents.metadata, "calibration": facts(text)})
        with bar("Converting", contents.source_bytes) as progress:
            written = write(dst, contents, rounding, overwrite=overwrite, progress=progress)
        return Converted(contents, written, spoilt, kept, text, rounding.loss)

    def _text(self, bar: Bars) -> Text:
        """The text to calibrate on."""
        if self.calibrate != "self":
            return read_text(Path(self.calibrate), self.tokenizer, TOKENS)
        ends = self.contents.metadata.get("ends", [END_OF_TEXT])
        with bar(WRITING, TOKENS) as progress:
            return own_text(self.source_model, first_token(ends), TOKENS, progress)


def _planned(name: str, entry: Entry, source: SourceTensor, quantization: str) -> Planned:
    def derived(a: NDArray[np.float32]) -> NDArray[np.float32]:
        """The source may have more or fewer dimensions of 1, as official vectors have."""
        a = a.reshape(entry.source_shape or entry.shape)
        return (entry.derive(a) if entry.derive else a).reshape(entry.shape)

    derive = derived if entry.derive or entry.kind == "vector" else None
    layout = layout_for(entry.kind, quantization)
    return Planned(name, source, layout, entry.shape, derive, late=name == "head.weight")


def _ends(eos: int | None, stated: Any, tokenizer: Tokenizer | None, vocab: int) -> list[int]:
    """The tokens that end a text: the one asked for, else the official one and those that the source states.

    The official one ends no text where a vocabulary gives it a text of its own.
    """
    if eos is not None:
        if not 0 <= eos < vocab:
            raise TokenizerError(f"--eos {eos}: the model's vocabulary has ids from 0 to {vocab - 1}")
        return [eos]
    official = not (isinstance(tokenizer, WorldTokenizer) and tokenizer.table[END_OF_TEXT])
    listed = stated if isinstance(stated, list) else [stated]
    known = [token for token in listed if type(token) is int and 0 <= token < vocab]
    return sorted({*known, *([END_OF_TEXT] if official else [])})


def default_destination(src: Path, quantization: str, adapters: Sequence[Path] = ()) -> Path:
    """The names of `src` and of the adapters with the format's ending, beside `src`."""
    paths = [full_path(path) for path in (src, *adapters)]
    stem = "+".join(path.name if path.is_dir() else _stem(path) for path in paths)
    ending = FORMATS[quantization].NAME if quantization in FORMATS else quantization
    named = src.name not in ("", "..")  # then the place is said as it was given
    return (src.parent if named else paths[0].parent) / f"{stem}.{ending}.safetensors"


def _stem(path: Path) -> str:
    """The name of a file without the ending of a checkpoint. A name such as rwkv7-g1a-0.1b has none."""
    return path.stem if path.suffix.lower() in ENDINGS else path.name


def full_path(src: Path) -> Path:
    """The path with a name and a parent. Links are not followed, since download caches link to files named by hash."""
    return src.absolute() if src.name not in ("", "..") else src.resolve()


def check_destination(dst: Path, conversion: Conversion, *, overwrite: bool) -> None:
    """Raise FormatError for a file that cannot be written, or that is one of the source's own, before any work."""
    if dst.is_dir():
        raise FormatError(f"{dst} is a folder; give the name of a file as DST")
    if not dst.parent.is_dir():
        raise FormatError(f"{dst.parent} is not a folder; make it first, or give another DST")
    if dst.exists() and any(dst.samefile(file.path) for file in conversion.contents.files):
        raise FormatError(f"{dst} is the source itself; give another DST")
    if dst.exists() and not overwrite:
        raise FormatError(f"{dst} exists; give --force to replace it, or another DST")


def find_tokenizer(choice: str, src: Path, vocab: int, settings: Mapping[str, Any] | None = None) -> Tokenizer | None:
    """The tokenizer that was chosen. With `auto`, a GGUF file has it in its `settings`.

    Otherwise, a file beside `src` or the vocabulary's size tells which one fits. Raises TokenizerError if the one asked
    for does not fit.
    """
    tokenizer: Tokenizer | None
    if choice == "auto":
        settings = settings or {}
        tokenizer = tokenizer_inside(src, settings)
        if tokenizer is not None and tokenizer.size <= vocab:
            return tokenizer
        folder = src if src.is_dir() else full_path(src).parent
        names = [f"{_stem(full_path(src))}.tokenizer.json", "tokenizer.json", "20B_tokenizer.json"]
        names += sorted((file.name for file in folder.glob("rwkv_vocab_*.txt")), reverse=True)
        names += ["vocab.json"] if _json_vocabulary(folder / "vocab.json") else []
        for name in names:
            if (folder / name).is_file():
                tokenizer = read_tokenizer_file(folder / name)
                # a vocabulary is padded by a few hundred rows at most, so any other file lies here by chance
                if tokenizer.size <= vocab < tokenizer.size + 512:
                    return tokenizer
        check_kind(src, settings)
        if vocab == 65536:
            return WorldTokenizer.from_vocabulary(official_vocabulary())
        return ByteTokenizer() if vocab == 256 else None
    path = official_vocabulary() if choice == "world" else Path(choice)
    tokenizer = read_tokenizer_file(path)
    if tokenizer.size > vocab:
        raise TokenizerError(f"{path}: has ids up to {tokenizer.size - 1}, but the model's vocabulary is {vocab}")
    return tokenizer


def read_tokenizer_file(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, or in a vocabulary as text or JSON."""
    check_regular(path)
    data = path.read_bytes()
    try:
        vocabulary = _json_vocabulary(path)
        if vocabulary:
            return WorldTokenizer.from_json(vocabulary, str(path))
        if data.lstrip()[:1] == b"{":
            tokenizer = JsonTokenizer(data, str(path))
            tokenizer.check()
            return tokenizer
        return WorldTokenizer.from_vocabulary(path)
    except TokenizerError as error:
        raise TokenizerError(f"{error}; give a sound one with --tokenizer") from None


def _stored_template(choice: str, src: Path, settings: Mapping[str, Any], tokenizer: str, vocab: int) -> dict[str, Any]:
    """The metadata of the chat template: the one chosen, the source's own, or the one that the name tells."""
    if choice != "auto":
        return {"template": choice, "template_from": "choice"}
    path = full_path(src)
    found = template_inside(src, settings) or template_beside(src if src.is_dir() else path.parent)
    if found is not None:
        return found
    told = recognize(path.name, tokenizer, vocab)
    return {"template": told.name, "template_from": "name" if told.sure else "guess"}


def _json_vocabulary(path: Path) -> dict[str, Any]:
    """The tokens of a JSON file by their ids, as texts; empty if the file is missing or is another one.

    RWKV-LM writes such files in UTF-16. The vocab.json of other models has the ids of tokens.
    """
    data = path.read_bytes() if path.is_file() else b""
    if not data.startswith((b"{", b"\xff\xfe", b"\xfe\xff")):
        return {}
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and all(re.fullmatch("[0-9]+", key) for key in found) else {}


def _stored_tokenizer(tokenizer: Tokenizer | None) -> tuple[str, dict[str, Any]]:
    """The kind and the arrays that a converted file holds of a tokenizer."""
    if isinstance(tokenizer, WorldTokenizer):
        return tokenizer.kind, tokenizer.arrays()
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.kind, {"tokenizer.json": np.frombuffer(tokenizer.text, np.uint8)}
    return ("none" if tokenizer is None else tokenizer.kind), {}
