"""Reads torch `.pth` files without torch: a zip of raw storages and a pickle that says which tensor lies where.

The results are descriptions (`SourceTensor`), not tensors. `pickles.py` reads the pickle and executes nothing in it.
Files from before torch 1.6 are no zip. They are pickles one after the other and then the storages.
"""

import io
import zipfile
from collections.abc import Mapping, Sequence
from math import prod

from rwkv_cli.errors import FormatError
from rwkv_cli.quant.dtypes import BITS
from rwkv_cli.quant.pickles import DAMAGED, MAX_PICKLE, Storage, View, described, tensors_of
from rwkv_cli.quant.source import SourceFile, SourceTensor, extent

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first bytes of a file from before torch 1.6: torch's magic number as a pickle."""

_LOCAL_HEADER = 30

_REPEATED = 1 << 16
"""Bytes that tensors may be larger than twice their file, since small ones may repeat a number."""


def open_pth(file: SourceFile) -> dict[str, SourceTensor]:
    """Every tensor of a `.pth` (torch ≥ 1.6), strided and shared storages included.

    Raises FormatError for anything but a flat dictionary of float tensors whose storages lie in the file.
    """
    try:
        with zipfile.ZipFile(file.file) as archive:
            return _Archive(file, archive).tensors()
    except (
        zipfile.BadZipFile,
        EOFError,
        NotImplementedError,
        OSError,
        OverflowError,
        RuntimeError,
        ValueError,
    ) as error:
        # an OSError without a file name comes from an impossible offset
        if isinstance(error, FormatError) or getattr(error, "filename", None) is not None:
            raise
        raise FormatError(f"{file.path}: {DAMAGED} ({error}); download it again") from None


class _Archive:
    """The zip file of a checkpoint, as a zip and as plain bytes."""

    def __init__(self, file: SourceFile, archive: zipfile.ZipFile) -> None:
        self._file, self._archive = file, archive
        self._path, self._size = file.path, file.size
        self._entries = {info.filename: info for info in archive.infolist()}

    def tensors(self) -> dict[str, SourceTensor]:
        """Every tensor by its name."""
        found = [name for name in self._entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(found) != 1:
            raise FormatError(
                f"{self._path}: a zip without torch's data.pkl, so not a checkpoint; give the .pth itself"
            )
        (pickle,) = found
        prefix = pickle.removesuffix("data.pkl")
        order = self._entries.get(prefix + "byteorder")
        if order is not None and self._content(order).strip() != b"little":
            raise FormatError(
                f"{self._path}: saved on a big-endian machine, which is not supported; save it on another"
            )
        views = tensors_of(self._path, described(self._path, self._content(self._entries[pickle])))
        _check_total(self._file, views)
        return {
            name: self._locate(self._entries.get(f"{prefix}data/{view.storage.key}"), name, view)
            for name, view in views.items()
        }

    def _content(self, entry: zipfile.ZipInfo) -> bytes:
        self._check_stored(entry)
        if entry.file_size > MAX_PICKLE:
            raise FormatError(
                f"{self._path}: {entry.filename!r} in it is larger than any checkpoint's; download it again"
            )
        return self._archive.read(entry)

    def _check_stored(self, entry: zipfile.ZipInfo) -> None:
        """Refuse an entry that is compressed."""
        if entry.compress_type != zipfile.ZIP_STORED:
            raise FormatError(
                f"{self._path}: {entry.filename!r} in it is compressed; "
                "unpack and zip again without compression (zip -0)"
            )

    def _locate(self, entry: zipfile.ZipInfo | None, name: str, view: View) -> SourceTensor:
        """The place of a tensor in the file."""
        storage, where = view.storage, f"{self._path}: tensor {name}"
        if entry is None:
            raise FormatError(f"{where}: its data (storage {storage.key!r}) is missing; download it again")
        self._check_stored(entry)
        item = BITS[storage.dtype].itemsize
        if entry.file_size != storage.numel * item or entry.compress_size != entry.file_size:
            raise FormatError(f"{where}: storage {storage.key!r} has the wrong size; download the file again")
        _check_inside(where, view)
        header = b""
        if entry.header_offset < self._size:
            self._file.file.seek(entry.header_offset)
            header = self._file.file.read(_LOCAL_HEADER)
        if len(header) != _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
            raise FormatError(f"{where}: no data where the file says; download it again")
        skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = entry.header_offset + _LOCAL_HEADER + skip
        if start + entry.file_size > self._size:
            raise FormatError(f"{where} reaches past the end of the file; download it again")
        return SourceTensor(self._file, storage.dtype, view.shape, start + view.offset * item, view.strides)


def _check_inside(where: str, view: View) -> None:
    """Refuse a tensor that is longer than its storage."""
    if prod(view.shape) and view.offset + extent(view.shape, view.strides) > view.storage.numel:
        raise FormatError(f"{where} reaches past the end of its storage; download the file again")


def _check_total(file: SourceFile, views: Mapping[str, View]) -> None:
    """Refuse tensors that repeat few numbers until they are many, as views with strides of 0 can.

    Tied embeddings lie in a storage once and count twice, so that twice the file is allowed.
    """
    size = file.size
    total = sum(prod(view.shape) * BITS[view.storage.dtype].itemsize for view in views.values())
    if total > 2 * size + _REPEATED:
        raise FormatError(
            f"{file.path}: its {size} bytes describe tensors of {total} bytes; save plain copies of them (.clone())"
        )


def open_legacy(source: SourceFile) -> dict[str, SourceTensor]:
    """Every tensor of a file from before torch 1.6 (torch/serialization.py, `_legacy_load`).

    Its pickles are the magic number, the protocol, facts about the machine, the tree and the keys of the storages. Then
    each storage has its length and its numbers. Raises FormatError as `open_pth` does.
    """
    path = source.path
    source.file.seek(0)
    pickles = io.BytesIO(source.file.read(MAX_PICKLE))
    storages: dict[str, Storage] = {}
    _, _, machine, tree, keys = (described(path, pickles, storages) for _ in range(5))
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise FormatError(f"{path}: saved on a big-endian machine, which is not supported; save it on another")
    views = tensors_of(path, tree)
    _check_total(source, views)
    listed = [storages.get(key) for key in keys] if isinstance(keys, list) else []
    starts = _starts(source, pickles.tell(), listed)
    found = {}
    for name, view in views.items():
        where = f"{path}: tensor {name}"
        if view.storage.key not in starts:
            raise FormatError(f"{where}: its data (storage {view.storage.key!r}) is missing; download it again")
        _check_inside(where, view)
        start = starts[view.storage.key] + view.offset * BITS[view.storage.dtype].itemsize
        found[name] = SourceTensor(source, view.storage.dtype, view.shape, start, view.strides)
    return found


def _starts(source: SourceFile, at: int, storages: Sequence[Storage | None]) -> dict[str, int]:
    """The first byte of each storage of a file from before torch 1.6, whose first one begins at `at`."""
    starts, file, path = {}, source.file, source.path
    for storage in storages:
        if storage is None or storage.item_size is None:
            what = "one without a tensor" if storage is None else f"a {storage.dtype!r:.80}"
            raise FormatError(f"{path}: its storages cannot be told apart, since it holds {what}; save it anew")
        file.seek(at)
        starts[storage.key] = at + 8
        numel = int.from_bytes(file.read(8), "little")
        at += 8 + numel * storage.item_size
        if numel != storage.numel or at > source.size:
            raise FormatError(f"{path}: {DAMAGED} (storage {storage.key!r:.80}); download it again")
    return starts
