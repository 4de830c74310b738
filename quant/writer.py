"""Writes a converted file: one safetensors, streamed a block of rows at a time and renamed into place when whole."""

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import FormatError
from rwkv_cli.quant.formats import format_of
from rwkv_cli.quant.formats.contract import Facts, Format, Part, Shape, Spec
from rwkv_cli.quant.header import Header, places, size_of
from rwkv_cli.quant.pipeline import Ahead, Behind, Block
from rwkv_cli.quant.replacing import replacing
from rwkv_cli.quant.source import SourceFile, SourceTensor

_BLOCK_BYTES = 4 << 20
"""Bytes of the float32 rows that are worked on together. They stay in a cache."""


@dataclass(frozen=True)
class Planned:
    """One tensor to write."""

    name: str
    source: SourceTensor
    layout: str
    """A layout of one of the formats."""
    shape: Shape
    derive: Callable[[Block], Block] | None = None
    """A function that turns the values of the source into this tensor; None leaves them as they are."""
    late: bool = False
    """True for a tensor that is rounded after all others."""
    kept: bool = False
    """True for a tensor that has more bits than it was to have, since those would spoil it."""

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @property
    def source_bytes(self) -> int:
        return round(self.weights * self.source.item_size)

    @property
    def stored_bytes(self) -> int:
        return sum(map(size_of, self.parts.values()))

    @property
    def spec(self) -> Spec:
        return Spec(self.layout, self.shape, self.source.float_dtype)

    @property
    def format(self) -> Format:
        format = format_of(self.layout)
        assert format is not None, self.layout
        return format

    @property
    def parts(self) -> dict[str, Part]:
        """The arrays in the file by their names."""
        endings, parts = self.format.SUFFIXES, self.format.parts(self.spec)
        return {self.name + ending: part for ending, part in zip(endings, parts, strict=True)}

    def blocks(self) -> list[tuple[int, int]]:
        """Row ranges of at most 4 MiB of float32, each a multiple of the rows that the layout keeps together."""
        rows, columns = self.shape[0], prod(self.shape[1:])
        together = self.format.rows_together(self.spec)
        step = max(1, _BLOCK_BYTES // 4 // max(columns, 1) // together) * together
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    @property
    def read_twice(self) -> bool:
        """True for a quantized tensor of several blocks, or a late one: it is first measured and then rounded."""
        return self.format.QUANTIZED and (self.late or len(self.blocks()) > 1)

    def whole(self) -> Block:
        """All values of the tensor. Raises FormatError where the source holds NaN or infinity."""
        whole = self.source.float32()
        if not np.isfinite(whole).all():  # exp would hide an infinity from later checks
            raise FormatError(_damaged(self))
        if self.derive is not None:
            with np.errstate(over="ignore"):
                whole = self.derive(whole)
        if whole.shape != self.shape:
            raise FormatError(f"{self.source.path}: tensor {self.name} came out as {whole.shape}, not {self.shape}")
        return whole


@dataclass(frozen=True)
class Contents:
    """Everything that goes into a converted file."""

    plan: Sequence[Planned]
    metadata: Mapping[str, Any]
    """Values that become JSON."""
    arrays: Mapping[str, NDArray[np.uint8]]
    """Arrays that are no tensors of the model, such as the tokenizer's."""

    @property
    def files(self) -> set[SourceFile]:
        """The files that the numbers come from."""
        return {file for planned in self.plan for file in planned.source.files}

    @property
    def weights(self) -> int:
        return sum(planned.weights for planned in self.plan)

    @property
    def source_bytes(self) -> int:
        """Bytes of the tensors before conversion."""
        return sum(planned.source_bytes for planned in self.plan)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors after conversion."""
        return sum(planned.stored_bytes for planned in self.plan)

    @property
    def file_bytes(self) -> int:
        """Bytes of the file, its header not counted."""
        return self.tensor_bytes + sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True)
class Written:
    """One tensor after it was written."""

    planned: Planned
    facts: Facts
    """The metadata that only the numbers tell."""
    error: float | None
    """The relative error ‖stored − source‖ / ‖source‖ (Frobenius), or None for a tensor that stays float."""
    effect: float | None = None
    """The relative error of what the model computes with the tensor, where that is known."""


class Measured(NamedTuple):
    """One tensor after it was read."""

    planned: Planned
    largest: float
    """The largest absolute value of the tensor."""
    squares: float
    rows: Block
    """The last block of the tensor."""


class Rounding(Protocol):
    """The way in which the tensors of one file are rounded."""

    def quantizer(self, planned: Planned) -> Any:
        """The kernel for a tensor, of its format's own signature. Tensors come in the plan's order, late ones last."""

    def effect(self, planned: Planned) -> float | None:
        """The relative error of what the model computes with a tensor whose rows are rounded; None if not known."""

    def measured(self, part: Path) -> Mapping[str, Any]:
        """Metadata that only the written file tells, which is `part` for now. The contents hold a wider value."""


def write(
    path: Path, contents: Contents, rounding: Rounding, *, overwrite: bool, progress: Callable[[int], object]
) -> list[Written]:
    """Write a converted file.

    `progress` is called with the source bytes done since the last call. The file appears under `path` only when it is
    whole and on disk, and a failure leaves nothing behind. Raises FormatError for NaN or infinity, and OSError where
    the system refuses (FileExistsError if `path` is there and not `overwrite`).
    """
    need, free = contents.file_bytes, shutil.disk_usage(path.parent).free
    if need > free:
        raise OSError(
            f"{path}: needs {need / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free; give a DST on another"
        )
    parts = {name: part for planned in contents.plan for name, part in planned.parts.items()}
    parts |= {name: Part("U8", array.shape) for name, array in contents.arrays.items()}
    tensors = {planned.name: {"layout": planned.layout, "shape": planned.shape} for planned in contents.plan}
    header = Header(places(parts), tensors, contents.metadata)
    room = header.room()
    starts = {name: room + place.start for name, place in header.places.items()}
    with replacing(path, overwrite) as file, Behind() as behind, Ahead(_reads(contents.plan)) as ahead:
        file.truncate(max(room + place.stop for place in header.places.values()))
        stream = _Stream(file, starts, ahead, behind)
        written: dict[str, Written] = {}
        late = []
        for planned in contents.plan:
            measured = stream.measure(planned)
            if not planned.format.QUANTIZED:
                written[planned.name] = Written(planned, {}, None)
            elif planned.late:
                written[planned.name] = Written(planned, {}, None)  # it keeps its place in the table
                late.append(measured)
                continue
            else:
                written[planned.name] = stream.round(measured, rounding)
            progress(planned.source_bytes)
        for measured in late:
            written[measured.planned.name] = stream.round(measured, rounding)
            progress(measured.planned.source_bytes)
        for name, array in contents.arrays.items():
            stream.append(name, array)
        behind.finish()
        for source in contents.files:
            source.check()
        facts = {name: item.facts for name, item in written.items()}
        digest = f"sha256:{stream.digest.hexdigest()}"
        file.seek(0)
        file.write(header.encoded(facts, digest, room))
        file.flush()
        more = rounding.measured(Path(file.name))
        if more:
            file.seek(0)
            file.write(header._replace(metadata={**contents.metadata, **more}).encoded(facts, digest, room))
    _forget(path)
    return list(written.values())


def _forget(path: Path) -> None:
    """Drop the file from the system's cache, where it lies in small pages. The next reader maps it in huge ones."""
    with contextlib.suppress(AttributeError, OSError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _Stream:
    """The way of tensors into a file: they are read, hashed, encoded and appended to their arrays."""

    def __init__(self, file: IO[bytes], starts: Mapping[str, int], ahead: Ahead, behind: Behind) -> None:
        self._file, self._ends, self._ahead, self._behind = file, dict(starts), ahead, behind
        self.digest = hashlib.sha256()

    def measure(self, planned: Planned) -> Measured:
        """Read one tensor for the digest and for what rounding has to know. A float one is written, too."""
        self._behind.do(self.digest.update, f"{planned.name}{list(planned.shape)}".encode())
        largest, squares = 0.0, 0.0
        rows = np.empty(0, np.float32)
        for _ in planned.blocks():
            rows = self._ahead.block()
            # both are NaN if one number is
            low, high = (float(rows.min()), float(rows.max())) if rows.size else (0.0, 0.0)
            if not np.isfinite(high - low):
                raise FormatError(_damaged(planned))
            largest = max(largest, -low, high)
            squares += float(np.vdot(rows, rows))
            self._behind.do(self.digest.update, np.ascontiguousarray(rows).data)
            if not planned.format.QUANTIZED:
                self._encode(planned, rows, {}, None)
        if largest > 1e10:
            raise FormatError(
                f"{planned.source.path}: tensor {planned.name} holds a value of {largest:.1e}; the file is damaged, "
                "download it again"
            )
        return Measured(planned, largest, squares, rows)

    def round(self, measured: Measured, rounding: Rounding) -> Written:
        """Bring a tensor that is to be quantized into the file."""
        planned, squared_error = measured.planned, 0.0
        facts = planned.format.facts_of(measured.largest)
        quantizer = rounding.quantizer(planned)
        for _ in planned.blocks():
            rows = self._ahead.block() if planned.read_twice else measured.rows
            squared_error += self._encode(planned, rows, facts, quantizer)
        error = float(np.sqrt(squared_error / measured.squares)) if measured.squares else 0.0
        effect = rounding.effect(planned)
        facts = {**facts, "error": float(f"{error:.4g}")}
        if effect is not None:
            facts["effect"] = float(f"{effect:.4g}")
        return Written(planned, facts, error, effect)

    def _encode(self, planned: Planned, rows: Block, facts: Facts, quantizer: Any) -> float:
        """Append rows in their format. Returns the squared error of that."""
        encoded = planned.format.encode(rows, planned.spec, facts, quantizer)
        for name, array in zip(planned.parts, encoded.parts, strict=True):
            self.append(name, array)
        return encoded.squared_error

    def append(self, name: str, array: NDArray[Any]) -> None:
        """Have an array written behind what its name has got so far."""
        self._behind.do(self._write, self._ends[name], array)
        self._ends[name] += array.nbytes

    def _write(self, start: int, array: NDArray[Any]) -> None:
        self._file.seek(start)
        self._file.write(np.ascontiguousarray(array).data)


def _reads(plan: Sequence[Planned]) -> Iterator[Callable[[], Block]]:
    """A call for each block, in the order in which `write` asks for them."""
    late: list[Callable[[], Block]] = []
    for planned in plan:
        whole = functools.cache(planned.whole)

        def rows(start: int, stop: int, planned: Planned = planned, whole: Callable[[], Block] = whole) -> Block:
            return planned.source.float32(start, stop) if planned.derive is None else whole()[start:stop]

        reads = [functools.partial(rows, start, stop) for start, stop in planned.blocks()]
        yield from reads
        if planned.late:
            late += reads
        elif planned.read_twice:
            yield from reads
    yield from late


def _damaged(planned: Planned) -> str:
    return f"{planned.source.path}: tensor {planned.name} holds NaN or infinity; the file is damaged, download it again"
