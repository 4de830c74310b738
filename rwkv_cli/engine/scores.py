"""The scores of texts as lines of a file."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_cli.engine.handed import Handed
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.scoring import Bin, Comparison, Score


def score_record(model: Path, file: Path, score: Score) -> dict[str, Any]:
    """Return a text's figures for JSON, with the names of the model and the text before them."""
    return {"model": str(model), "file": str(file), **score.as_json()}


def score_digest(models: Sequence[LanguageModel], file: Path, text: Handed, settings: Sequence[int | None]) -> str:
    """Return a short name for everything that a score depends on."""
    kinds = [(model.digest, model.quantization, model.text_tokenizer.kind) for model in models]
    facts = [kinds, str(file), text.digest, *settings]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


class Scores:
    """The records of a file of scores, by their digests. Scores of other texts or models may lie beside them."""

    name = "a score of rwkv ppl"

    def __init__(self, model: Path, files: Mapping[str, Path]) -> None:
        """`files` are the texts of this run by their digests."""
        self._model, self._files = model, files

    def read(self, record: Any) -> tuple[str, Score]:
        """Return the digest and the score."""
        return record["digest"], _score(record)

    def beginnings(self) -> Iterator[bytes]:
        """Yield each line up to the first figure."""
        for file in self._files.values():
            names = {"model": str(self._model), "file": str(file)}
            yield json.dumps(names).encode().removesuffix(b"}")

    def line(self, digest: str, score: Score) -> bytes:
        """Write a score as a line of JSON."""
        record = score_record(self._model, self._files[digest], score)
        return json.dumps({**record, "digest": digest}).encode() + b"\n"


def _score(record: dict[str, Any]) -> Score:
    """Read what `Score.as_json` returned. Where it is not that, raises what `Kind.read` does."""
    compared = None
    if "kl_mean" in record:
        figures = {name: _number(record[name]) for name in Comparison.__annotations__ if name != "other_by_position"}
        compared = Comparison(**figures, other_by_position=_bins(record["other_by_position"]))
    return Score(
        int(record["tokens"]),
        int(record["bytes"]),
        _number(record["nll"]),
        _number(record["nll_stderr"]),
        record["tokens"] / record["tokens_per_second"],
        record["context"],
        record["start_token"],
        _bins(record["by_position"]),
        compared,
    )


def _number(value: Any) -> float:
    """Read a float. NaN was written as null, as JSON lacks it."""
    return math.nan if value is None else float(value)


def _bins(rows: Any) -> tuple[Bin, ...]:
    """Read the NLL by position."""
    return tuple(Bin(int(a), int(b), int(n), _number(nll), _number(error)) for a, b, n, nll, error in rows)
