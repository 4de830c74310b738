"""The chat template of a converted file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwkv_cli.engine.forms import Template
from rwkv_cli.engine.rendered import OWN, Rendered, is_g1h
from rwkv_cli.engine.templates import TEMPLATES, recognize
from rwkv_cli.errors import ConversationError, FormatError
from rwkv_cli.quant import Checkpoint

_MOST_BYTES = 1 << 20
"""The size of the largest template file that is read."""


@dataclass(frozen=True)
class StoredTemplate:
    """The template that a converted file names, and its text where it came with the checkpoint."""

    path: Path
    name: str
    source: str = ""
    special: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> StoredTemplate:
        """Read what a converted file says. Files without `template_from` knew nothing of G1h, so their source tells."""
        name: str = checkpoint.metadata("template", str)
        if not checkpoint.has("template_from"):
            if name in ("g1", "world") and checkpoint.has("source"):
                told = recognize(checkpoint.metadata("source", str), "world", 65536).name
                name = told if told == "g1h" else name
            return cls(checkpoint.path, name)
        if name != OWN:
            return cls(checkpoint.path, name)
        special = checkpoint.metadata("special_tokens", dict)
        if not all(isinstance(text, str) for text in special.values()):
            raise FormatError(f"{checkpoint.path}: metadata 'special_tokens' is damaged; convert the model again")
        return cls(checkpoint.path, name, checkpoint.metadata("chat_template", str), special)

    def template(self, name: str | None = None, style: str | None = None) -> Template:
        """Return the template, or the one of another name. Raises ConversationError."""
        name = name or self.name
        if name == OWN and self.source:
            try:
                found: Template = Rendered.of(self.source, self.special)
            except ConversationError as error:
                raise ConversationError(f"{self.path}: {error}") from None
        elif name in TEMPLATES:
            found = TEMPLATES[name]
        else:
            raise ConversationError(f"{self.path}: its chat template {name!r} is unknown; choose one with --template")
        return found.styled(style) if style else found


def template_beside(folder: Path) -> dict[str, Any] | None:
    """Find a chat template in a checkpoint's folder: what a converted file says of it, or None if there is none.

    Raises FormatError for one that cannot be used.
    """
    config_file, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config: Any = {}
    if config_file.is_file():
        try:
            config = json.loads(_read(config_file))
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise FormatError(f"{config_file}: is no JSON object; mend it, or name a template with --template")
    source, where = config.get("chat_template"), config_file
    if isinstance(source, list):  # several templates, each with a name
        named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = named[-1].get("template") if named else None
    if file.is_file():
        source, where = _read(file), file
    if not isinstance(source, str) or not source.strip():
        return None
    return judged(where, source, {key: _text(config.get(key)) for key in ("bos_token", "eos_token")}, "folder")


def judged(where: Path, source: str, special: dict[str, str], origin: str) -> dict[str, Any]:
    """Try a template in Jinja's language, and return what a converted file says of it.

    `where` is the file that it stands in, and `origin` says of what kind that is. Raises FormatError.
    """
    try:
        "".join([source, *special.values()]).encode()
    except UnicodeEncodeError:
        raise FormatError(f"{where}: holds half a surrogate pair, which is no text; mend it") from None
    try:
        template = Rendered.of(source, special)
        known = is_g1h(template)
    except ConversationError as error:
        raise FormatError(f"{where}: {error}") from None
    if known:
        return {"template": "g1h", "template_from": origin}
    return {"template": OWN, "template_from": origin, "chat_template": source, "special_tokens": special}


def _text(token: Any) -> str:
    """Return the text of a special token, which a configuration may wrap."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _read(path: Path) -> str:
    """Return the text of a file of moderate size."""
    if path.stat().st_size > _MOST_BYTES:
        raise FormatError(f"{path}: is too large for a template; name one with --template")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{path}: is no UTF-8 text; mend it, or name a template with --template") from None
