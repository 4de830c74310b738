"""Languages that answers have to belong to, by llguidance: JSON, JSON of a schema, tool calls, grammars."""

import json
import weakref
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from rwkv_cli.engine.json_tokenizer import JsonTokenizer
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.errors import GrammarError
from rwkv_cli.server.errors import ApiError
from rwkv_cli.server.fields import Fields
from rwkv_cli.server.tools import FENCE, MARK

_COMPACT = {"x-guidance": {"whitespace_flexible": False}}
"""Said in a schema: there is one way to write a value, so that blanks never go on for ever."""

_TOKENIZERS: weakref.WeakKeyDictionary[LanguageModel, LLTokenizer] = weakref.WeakKeyDictionary()
"""The tokenizers of models as the library has them, which take a moment to make."""


class Language:
    """A language, checked for a model. Each answer follows it on its own (`Guide`)."""

    def __init__(self, model: LanguageModel, inner: dict[str, Any], begun: str | None, param: str) -> None:
        """`inner` is the grammar of the answer's text, and `begun` the part of the answer that the prompt has begun.

        `begun` is None where the text begins at once. Raises ApiError, which names `param`.
        """
        self._model = model
        self._tokenizer = _tokenizer(model)
        grammars = [{"name": "inner", **inner}]
        text_alone = json.dumps({"grammars": grammars})
        if begun is not None:
            grammars.insert(0, {"name": "outer", "lark_grammar": _before(begun)})
        self._grammar = json.dumps({"grammars": grammars})
        says = LLMatcher.validate_grammar(self._grammar, self._tokenizer)
        if says and not says.startswith("WARNING"):
            raise ApiError(400, f"'{param}' cannot be followed: {says:.300}", param)
        try:
            Guide(model, LLMatcher(self._tokenizer, text_alone, log_level=0)).allowed()
        except GrammarError:
            raise ApiError(400, f"'{param}' cannot be followed: no text is of this form", param) from None

    def guide(self) -> "Guide":
        """Begin to follow an answer."""
        return Guide(self._model, LLMatcher(self._tokenizer, self._grammar, log_level=0))


class Guide:
    """An answer that is followed (`engine.choosing.Grammar`)."""

    def __init__(self, model: LanguageModel, matcher: LLMatcher) -> None:
        self._model, self._matcher = model, matcher
        self._vocab, self._ends = model.config.vocab, model.ends

    def __deepcopy__(self, _memo: dict[int, Any]) -> "Guide":
        """Follow the answer from here on apart from this one."""
        return Guide(self._model, self._matcher.deep_copy())

    def allowed(self) -> NDArray[np.bool_]:
        """Return for each token [V] whether it may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab, bitorder="little").view(np.bool_)

    def take(self, token: int) -> list[int]:
        """Follow a token. Returns those that must come after it, an end token where nothing more may come."""
        if token in self._ends:
            return []
        self._matcher.consume_token(token)
        forced: list[int] = self._matcher.compute_ff_tokens()
        if forced:
            self._matcher.consume_tokens(forced)
        self._check()
        return [*forced, self._ends[0]] if self._matcher.is_stopped() else forced

    def _check(self) -> None:
        """Raise GrammarError where the library has given up, such as for a grammar that takes too long."""
        if self._matcher.is_error():
            why = self._matcher.get_error().partition("\n")[0]
            raise GrammarError(f"the answer cannot follow its grammar any further ({why:.200})")


def wanted_language(fields: Fields, tool_names: list[str]) -> tuple[dict[str, Any], str] | None:
    """Read the language that a request asks for, and the field that does. Raises ApiError."""
    asked = [_response_format(fields), _own(fields), _tool_choice(fields, tool_names)]
    found = [language for language in asked if language is not None]
    if len(found) > 1:
        raise ApiError(400, f"'{found[0][1]}' and '{found[1][1]}' exclude each other", found[1][1])
    return found[0] if found else None


def _response_format(fields: Fields) -> tuple[dict[str, Any], str] | None:
    """Read OpenAI's field."""
    form = fields.object("response_format")
    if form is None:
        return None
    kind = form.choice("type", ["text", "json_object", "json_schema"])
    if kind is None:
        raise form.wrong("type", "text, json_object or json_schema")
    schema: Any = {"type": "object"}
    if kind == "json_schema":
        inside = form.object("json_schema")
        schema = inside.get("schema") if inside is not None else None
        if not isinstance(schema, dict):
            raise form.wrong("json_schema", "an object with a schema")
    return None if kind == "text" else ({"json_schema": {**schema, **_COMPACT}}, "response_format")


def _own(fields: Fields) -> tuple[dict[str, Any], str] | None:
    """Read our field: a grammar in Lark's language or in llama.cpp's."""
    text = fields.text("grammar")
    if not text:
        return None
    try:
        return {"lark_grammar": any_to_lark(text)}, "grammar"
    except Exception as error:  # the library raises bare Exceptions
        raise ApiError(400, f"'grammar' cannot be read: {error!s:.300}", "grammar") from None


def _tool_choice(fields: Fields, names: list[str]) -> tuple[dict[str, Any], str] | None:
    """Read which tool has to be called."""
    choice = fields.get("tool_choice")
    if choice in (None, "auto", "none"):
        return None
    if isinstance(choice, dict):
        inner = choice.get("function")
        name = inner.get("name") if isinstance(inner, dict) else choice.get("name")
        allowed = [name] if name in names else []
    else:
        allowed = names if choice == "required" else []
    if not allowed:
        raise fields.wrong("tool_choice", "none, auto, required or one of the tools")
    calls = []
    for tool in fields.get("tools"):
        function = tool.get("function", tool)
        if function["name"] in allowed:
            parameters = function.get("parameters") or {"type": "object"}
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": function["name"]}, "arguments": parameters},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
            )
    schema = json.dumps({"anyOf": calls, **_COMPACT})
    start, end = json.dumps(f"{MARK}\n{FENCE}json\n"), json.dumps(f"\n{FENCE}")
    return {"lark_grammar": f"start: {start} call {end}\ncall: %json {schema}"}, "tool_choice"


def _before(begun: str) -> str:
    """Write the grammar of what comes before an answer's text, and of the text behind it."""
    if begun.endswith("</think"):
        return 'start: ">" /[ \\n]{0,2}/ @inner'
    if begun.startswith("<think") and "</think>" not in begun:
        return 'start: ">" thought /[ \\n]{0,2}/ @inner\nthought[suffix="</think>"]: /(.|\\n)*/'
    return "start: /[ \\n]?/ @inner"


def _tokenizer(model: LanguageModel) -> LLTokenizer:
    """Return the library's tokenizer for a model. Raises ApiError for a model without an end."""
    if not model.ends:
        raise ApiError(400, f"the model {model.path.stem} has no end token, so that no form can be demanded of it")
    if model not in _TOKENIZERS:
        found, ends = model.text_tokenizer, list(model.ends)
        kind: Any = found.text.decode() if isinstance(found, JsonTokenizer) else TokenizerWrapper(_Bytes(model))
        _TOKENIZERS[model] = LLTokenizer(kind, n_vocab=model.config.vocab, eos_token=ends)
    return _TOKENIZERS[model]


class _Bytes:
    """A tokenizer over bytes as the library wants it."""

    bos_token_id = None

    def __init__(self, model: LanguageModel) -> None:
        self._tokenizer = model.text_tokenizer
        table: list[bytes] = getattr(self._tokenizer, "table")  # noqa: B009 - all but JsonTokenizer have one
        self.tokens = [*table, *[b""] * (model.config.vocab - len(table))]
        self.eos_token_id = model.ends[0]
        self.special_token_ids = list(model.ends)
        for end in model.ends:
            self.tokens[end] = self.tokens[end] or b"<end>"

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text)
