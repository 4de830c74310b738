"""The inside of a server: its models by name, the scheduler that answers, and its limits."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rwkv_cli.engine.completion import uncounted
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.scheduler import Scheduler
from rwkv_cli.errors import RwkvError
from rwkv_cli.server.errors import ApiError


@dataclass(frozen=True, kw_only=True)
class Usual:
    """The operator's settings for answers of a model. They hold where a request says nothing."""

    sampling: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    system: str | None = None
    template: str | None = None
    style: str | None = None
    think: str | None = None


class Hosted:
    """A model of a server, loaded at its first use."""

    def __init__(
        self,
        name: str,
        path: Path,
        load: Callable[[Path], LanguageModel],
        *,
        in_chats: Usual = Usual(),
        elsewhere: Usual = Usual(),
    ) -> None:
        self.name, self.path, self.in_chats, self.elsewhere = name, path, in_chats, elsewhere
        self.created = int(path.stat().st_mtime)
        self._load, self._lock = load, threading.Lock()
        self._model: LanguageModel | None = None
        self.uncounted: frozenset[int] = frozenset()
        """Tokens that penalties do not count."""

    @property
    def loaded(self) -> bool:
        """True once the model was used."""
        return self._model is not None

    def model(self) -> LanguageModel:
        """Return the model. The first call loads it, which takes a while."""
        with self._lock:
            if self._model is None:
                model = self._load(self.path)
                model.template.template(self.in_chats.template, self.in_chats.style)  # said now, not to a client
                self.uncounted = uncounted(model.text_tokenizer)
                self._model = model
            return self._model

    def public(self, error: Exception) -> str:
        """Return what an error says, without the folders of this machine."""
        return str(error).replace(str(self.path), self.name)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The decisions of a server's operator."""

    max_tokens: int = 4096
    """The most tokens of an answer."""
    body_bytes: int = 8 << 20
    """The most bytes of a request."""
    api_key: str | None = None
    """The key that every request needs, None for none."""
    hosts: frozenset[str] = frozenset()
    """Names of this machine, beside its addresses and localhost, by which it may be called."""
    origins: frozenset[str] = frozenset()
    """Web sites whose pages may use the server."""


@dataclass
class Host:
    """A server's inside, for every endpoint."""

    models: Mapping[str, Hosted]
    scheduler: Scheduler
    settings: Settings
    log: Callable[[str], object]
    """A function that tells the operator a sentence."""
    started: float = field(default_factory=time.time)
    answered: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Number of answers by path and status."""

    async def find(self, name: str | None) -> tuple[Hosted, LanguageModel]:
        """Return the model that a request names. Without a name it is the first. Raises ApiError."""
        hosted = next(iter(self.models.values())) if name is None else self.models.get(name)
        if hosted is None:
            there = ", ".join(self.models)
            raise ApiError(404, f"there is no model {name!r:.100}; there are {there}", "model", "model_not_found")
        try:
            return hosted, await asyncio.to_thread(hosted.model)
        except (RwkvError, OSError, MemoryError) as error:
            self.log(f"{hosted.path} cannot be loaded: {error}")
            raise ApiError(500, f"the model {hosted.name} cannot be loaded; the server's operator sees why") from None
