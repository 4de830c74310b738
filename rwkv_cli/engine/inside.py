"""The tokenizer and the chat template that a GGUF file has inside, as llama.cpp's converter writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_cli.engine.stored import judged
from rwkv_cli.engine.tokenizer import END_OF_TEXT, WorldTokenizer
from rwkv_cli.errors import TokenizerError

_KIND, _TOKENS, _TYPES = (f"tokenizer.ggml.{name}" for name in ("model", "tokens", "token_type"))

_TEXT_TYPES = (1, 4)
"""The types of tokens that are texts: normal ones, and those of a user. Others are control tokens and padding."""

_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPED = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def tokenizer_inside(path: Path, metadata: Mapping[str, Any]) -> WorldTokenizer | None:
    """Read the tokenizer in the metadata of a GGUF file, or return None if there is none of RWKV's kind.

    Raises TokenizerError for one that is damaged.
    """
    tokens, types = metadata.get(_TOKENS), metadata.get(_TYPES)
    if metadata.get(_KIND) != "rwkv" or tokens is None:
        return None
    known = isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
    if not known or (types is not None and not (isinstance(types, list) and len(types) == len(tokens))):
        raise TokenizerError(f"{path}: the vocabulary in it is damaged; give one with --tokenizer")
    table = [_bytes_of(token) for token in tokens]
    for i, kind in enumerate(types or []):
        if kind not in _TEXT_TYPES:
            table[i] = b""
    table[END_OF_TEXT : END_OF_TEXT + 1] = [b""]
    while table and not table[-1]:
        table.pop()
    if not table or max(map(len, table)) > 255:
        raise TokenizerError(f"{path}: the vocabulary in it has no tokens, or too long ones; give one with --tokenizer")
    return WorldTokenizer(table)


def check_kind(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raise TokenizerError for a GGUF file whose tokenizer is of another kind, so that none is guessed in its place."""
    kind = metadata.get(_KIND, "none")
    if kind not in ("rwkv", "none"):
        raise TokenizerError(
            f"{path}: its tokenizer is of the kind {kind!r:.40}, which is not read from GGUF files; give the model's "
            "tokenizer.json with --tokenizer"
        )


def template_inside(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the chat template in the metadata: what a converted file says of it, or None if there is none.

    A text without Jinja's braces is a name that llama.cpp's converter gives to every RWKV model.
    """
    source = metadata.get("tokenizer.chat_template")
    if not isinstance(source, str) or "{" not in source:
        return None
    tokens = metadata.get(_TOKENS)
    end = tokens[END_OF_TEXT] if isinstance(tokens, list) and tokens else ""
    end = end if isinstance(end, str) else ""
    special = {
        f"{name}_token": end if metadata.get(f"tokenizer.ggml.{name}_token_id") == END_OF_TEXT else ""
        for name in ("bos", "eos")
    }
    return judged(path, source, special, "file")


def _bytes_of(token: str) -> bytes:
    """Return a token's bytes, which are there as Python writes them between quotes."""
    return _ESCAPE.sub(
        lambda found: bytes.fromhex(found[1].decode()) if found[1] else _ESCAPED.get(found[2], found[2]),
        token.encode("utf-8", "surrogateescape"),
    )
