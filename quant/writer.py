"""Write a converted file: one safetensors, streamed a block of rows at a time, renamed into place when whole."""

import contextlib
import functools
import hashlib
import json
import os
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import FormatError
from rwkv_cli.quant.checkpoint import FORMAT_VERSION
from rwkv_cli.quant.formats.int8 import Quantizer, arrange, block_width, unit_of
from rwkv_cli.quant.source import SourceTensor
from rwkv_cli.quant.tensor import BITS, stored_shapes

_BLOCK_BYTES = 4 << 20
_BEHIND = 3
"""Blocks that wait to be hashed or written."""
_ALIGN = 64


@dataclass(frozen=True)
class Planned:
    """One tensor to write. `layout` is one of `Int8`'s, or `float` (source's bits) or `vector` (float32)."""

    name: str
    source: SourceTensor
    layout: str
    shape: tuple[int, ...]
    derive: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None
    """What turns the source's values into this tensor; None: as they are."""

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @property
    def source_bytes(self) -> int:
        return self.weights * BITS[self.source.dtype].itemsize

    @property
    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Names, dtypes and shapes in the file."""
        if self.layout == "vector":
            return {self.name: ("F32", self.shape)}
        if self.layout == "float":
            return {self.name: (self.source.dtype, self.shape)}
        values, scales = stored_shapes(self.layout, (self.shape[0], self.shape[1]))
        return {self.name: ("I8", values), self.name + ".scale": ("F16", scales)}


@dataclass(frozen=True)
class Written:
    """What became of one tensor: relative error ‖stored − source‖ / ‖source‖ (Frobenius)."""

    name: str
    layout: str
    weights: int
    stored_bytes: int
    error: float


def file_size(plan: Sequence[Planned], extra: Mapping[str, NDArray[Any]]) -> int:
    """Bytes of the tensors of a file, its header not counted."""
    sizes = [prod(shape) * BITS[dtype].itemsize for p in plan for dtype, shape in p.stored.values()]
    return sum(sizes) + sum(array.nbytes for array in extra.values())


def write(
    path: Path,
    plan: Sequence[Planned],
    metadata: dict[str, Any],
    extra: Mapping[str, NDArray[Any]],
    overwrite: bool,
    quantizer: Quantizer,
    progress: Callable[[int], object],
) -> list[Written]:
    """Write `plan`'s tensors and the uint8 arrays of `extra` to `path`; `metadata` must be JSON.

    `progress` is called with the source bytes done since the last call. The file appears under `path` only when it is
    whole and on disk; whatever goes wrong before leaves nothing behind. Raises FormatError for NaN or infinity,
    OSError (FileExistsError if `path` is there and not `overwrite`) where the system refuses.
    """
    need, free = file_size(plan, extra), shutil.disk_usage(path.parent).free
    if need > free:
        raise OSError(
            f"{path}: needs {need / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free; give a DST on another"
        )
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for planned in plan:
        layout.update(planned.stored)
    for name, array in extra.items():
        layout[name] = ("U8", array.shape)
    names = sorted(layout, key=lambda name: _order(*layout[name]))
    tensors: dict[str, dict[str, Any]] = {}
    for planned in plan:
        tensors[planned.name] = {"layout": planned.layout, "shape": list(planned.shape)}

    with replacing(path, overwrite) as file, _Behind() as behind, _Ahead(plan) as ahead:
        written: list[Written] = []
        digest = hashlib.sha256()
        offsets, end = _offsets(names, layout)
        start = _header_room(layout, metadata, tensors)
        file.truncate(start + end)
        for planned in plan:
            out = _TensorWriter(file, {n: start + offsets[n] for n in planned.stored}, behind)
            written.append(_write_tensor(out, planned, tensors[planned.name], digest, quantizer, ahead))
            progress(planned.source_bytes)
        behind.wait()
        for name, array in extra.items():
            file.seek(start + offsets[name])
            file.write(np.ascontiguousarray(array).tobytes())
        file.seek(0)
        file.write(_header(start, names, layout, offsets, metadata, tensors, digest.hexdigest()))
    _forget(path)
    return written


def _forget(path: Path) -> None:
    """Take the file out of the system's cache, where it lies in small pages as it was written: whoever maps it next
    has it read into huge ones."""
    with contextlib.suppress(AttributeError, OSError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _order(dtype: str, shape: tuple[int, ...]) -> tuple[int, bool]:
    """Sort key of an array in the file: every int8 array begins at a multiple of 64 bytes, any other of its own size.

    Only the table's rows can be no multiple of 64 bytes together, so it comes last among int8.
    """
    return {"I8": 0, "F32": 1, "U8": 3}.get(dtype, 2), dtype == "I8" and prod(shape) % _ALIGN != 0


def _offsets(names: Sequence[str], layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, int], int]:
    offsets, end = {}, 0
    for name in names:
        dtype, shape = layout[name]
        offsets[name] = end
        end += prod(shape) * BITS[dtype].itemsize
    return offsets, end


def _header(
    start: int,
    names: Sequence[str],
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    offsets: Mapping[str, int],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Any],
    digest: str,
) -> bytes:
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "rwkv",
            "format_version": str(FORMAT_VERSION),
            "digest": f"sha256:{digest}",
            "tensors": json.dumps(tensors, separators=(",", ":")),
            **{key: json.dumps(value, separators=(",", ":")) for key, value in metadata.items()},
        }
    }
    for name in names:
        dtype, shape = layout[name]
        end = offsets[name] + prod(shape) * BITS[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return (start - 8).to_bytes(8, "little") + text.ljust(start - 8)


def _header_room(
    layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, Any], tensors: Mapping[str, Any]
) -> int:
    """Bytes before the data: the header with the widest numbers it can come to hold, aligned."""
    wide = dict.fromkeys(layout, 10**15)
    found = {name: {**entry, "unit": -999, "error": 1.234e-300} for name, entry in tensors.items()}
    size = len(_header(8, list(layout), layout, wide, metadata, found, "0" * 64))
    return -(-size // _ALIGN) * _ALIGN


class _Behind:
    """Another thread that hashes and writes, in order and not far behind, while this one reads and rounds."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[Any]] = deque()

    def __enter__(self) -> "_Behind":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def do(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have it done. Raises what an earlier one has raised."""
        if len(self._waiting) == _BEHIND:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(function, *arguments))

    def wait(self) -> None:
        """Until all is done."""
        while self._waiting:
            self._waiting.popleft().result()


class _Ahead:
    """Another thread that reads a block while the one before is worked on. Called, it gives the next block."""

    def __init__(self, plan: Sequence[Planned]) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._reads = _reads(plan)
        self._next: Future[NDArray[np.float32]] | None = None

    def __enter__(self) -> "_Ahead":
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        read = next(self._reads, None)
        self._next = self._thread.submit(read) if read else None

    def __call__(self) -> NDArray[np.float32]:
        assert self._next is not None, "more blocks are asked for than there are"
        block = self._next.result()
        self._begin()
        return block


class _TensorWriter:
    """Appends to each stored part of one tensor at its own place in the file."""

    def __init__(self, file: IO[bytes], offsets: dict[str, int], behind: _Behind) -> None:
        self.file, self.offsets, self.behind, self.count = file, offsets, behind, 0

    def append(self, name: str, array: NDArray[Any]) -> None:
        self.behind.do(self._write, self.offsets[name], array)
        self.offsets[name] += array.nbytes
        self.count += array.nbytes

    def _write(self, offset: int, array: NDArray[Any]) -> None:
        self.file.seek(offset)
        self.file.write(np.ascontiguousarray(array).data)


def _blocks(planned: Planned) -> Iterator[tuple[int, int]]:
    """Row ranges of a tensor of at most 4 MiB of float32, each a whole number of layout blocks."""
    rows, columns = planned.shape[0], prod(planned.shape[1:])
    step = max(1, _BLOCK_BYTES // 4 // max(columns, 1))
    if _quantized(planned):
        width = block_width(planned.layout, rows)
        step = max(width, step // width * width)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _quantized(planned: Planned) -> bool:
    return planned.layout not in ("vector", "float")


def _reads(plan: Sequence[Planned]) -> Iterator[Callable[[], NDArray[np.float32]]]:
    """What gives each block in the order in which `_write_tensor` asks: a matrix of several comes twice, to be measured
    and then to be rounded."""
    for planned in plan:
        whole = functools.cache(functools.partial(_derived, planned))

        def rows(start: int, stop: int, planned: Planned = planned, whole: Any = whole) -> NDArray[np.float32]:
            return planned.source.float32(start, stop) if planned.derive is None else whole()[start:stop]

        blocks = list(_blocks(planned))
        for start, stop in blocks * (2 if _quantized(planned) and len(blocks) > 1 else 1):
            yield functools.partial(rows, start, stop)


def _derived(planned: Planned) -> NDArray[np.float32]:
    """The whole tensor, made from its source."""
    assert planned.derive is not None
    whole = planned.source.float32()
    if not np.isfinite(whole).all():  # exp would hide an infinity
        raise FormatError(_damaged(planned))
    with np.errstate(over="ignore"):
        whole = planned.derive(whole)
    if whole.shape != planned.shape:
        raise FormatError(
            f"{planned.source.path}: tensor {planned.name} came out as {whole.shape}, not {planned.shape}"
        )
    return whole


def _damaged(planned: Planned) -> str:
    return f"{planned.source.path}: tensor {planned.name} holds NaN or infinity; the file is damaged, download it again"


def _write_tensor(
    out: _TensorWriter, planned: Planned, entry: dict[str, Any], digest: Any, quantizer: Quantizer,
    read: Callable[[], NDArray[np.float32]],
) -> Written:  # fmt: skip
    source = planned.source
    behind = out.behind
    behind.do(digest.update, f"{planned.name}{list(planned.shape)}".encode())
    top, square = 0.0, 0.0
    blocks, w = list(_blocks(planned)), np.empty(0, np.float32)
    for start, stop in blocks:
        w = read()
        low, high = (float(w.min()), float(w.max())) if w.size else (0.0, 0.0)  # NaN if there is one
        if not np.isfinite(high - low):
            raise FormatError(_damaged(planned))
        top = max(top, -low, high)
        square += float(np.vdot(w, w))
        behind.do(digest.update, np.ascontiguousarray(w).data)
        if planned.layout == "vector":
            out.append(planned.name, w)
        elif planned.layout == "float":
            same = planned.derive is None
            out.append(planned.name, source.bits(start, stop) if same else _bits_of(w, source.dtype))
    error = 0.0
    if top > 1e10:
        raise FormatError(
            f"{source.path}: tensor {planned.name} holds a value of {top:.1e}; the file is damaged, download it again"
        )
    if _quantized(planned):
        unit = entry["unit"] = unit_of(top)
        width = block_width(planned.layout, planned.shape[0])
        for _ in blocks:
            values, scales, squared = quantizer(w if len(blocks) == 1 else read(), unit)
            values, scales = arrange(planned.layout, width, values, scales)
            out.append(planned.name, values)
            out.append(planned.name + ".scale", scales)
            error += squared
    relative = float(np.sqrt(error / square)) if square else 0.0
    if _quantized(planned):
        entry["error"] = float(f"{relative:.4g}")
    return Written(planned.name, planned.layout, planned.weights, out.count, relative)


def _bits_of(w: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Back to the source's bits; exact, since deriving only moved values about."""
    w = np.ascontiguousarray(w)
    if dtype == "BF16":
        return (w.view(np.uint32) >> 16).astype(np.uint16)
    return w.astype(np.float16).view(np.uint16) if dtype == "F16" else w


@contextlib.contextmanager
def replacing(path: Path, overwrite: bool = True) -> Iterator[IO[bytes]]:
    """A file beside `path` that becomes `path` if the block succeeds and vanishes if it does not."""
    taken = FileExistsError(f"{path} exists; give --force to replace it, or another DST")
    if os.path.lexists(path) and not overwrite:
        raise taken
    part = path.with_name(f".rwkv-{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            part.replace(path)
        else:
            _move(part, path)
    except FileExistsError:
        raise taken from None
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(part)):
            raise
        raise OSError(error.errno, f"{error.strerror}; nothing was written", str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _move(part: Path, path: Path) -> None:
    """Give `part` the name `path`, but replace nothing that has appeared there meanwhile."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, such as exFAT
        if os.path.lexists(path):
            raise FileExistsError from None
        part.replace(path)
