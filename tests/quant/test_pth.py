"""Torch files: what torch writes, tensors in odd layouts, and files that are broken or hostile."""

import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import Result
from damaged import read_or_refused, read_source
from extras import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Call, Persistent, Ref, refused, tensor

from rwkv_cli.errors import FormatError
from rwkv_cli.models import naming
from rwkv_cli.quant import open_source

Run = Callable[..., Result]
few = settings(max_examples=60, deadline=None)
SMALL = tiny.weights("7", layers=1, width=16, vocab=256, head=8, ffn=32)
FLOATS = tiny.raw(np.arange(6, dtype=np.float32), "F32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pth")


def members(path: Path) -> tuple[bytes, dict[str, bytes]]:
    """The pickle and the storages of a file."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
        return archive.read("archive/data.pkl"), {name.rsplit("/", 1)[1]: archive.read(name) for name in names}


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("dict", "F32"), ("dict", "F16"), ("dict", "BF16"), ("parameters", "BF16"), ("state_dict", "F16"),
     ("views", "BF16"), ("protocol 5", "BF16")],
)  # fmt: skip
def test_a_file_of_torch_converts_to_the_same_bytes(rwkv: Run, tmp_path: Path, dtype: str, form: str) -> None:
    torch = needs("torch", "dev,reference", "the other tests read files that tiny.py writes")
    weights = tiny.weights("7", layers=2, vocab=256)
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    tree: Any = {name: torch.from_numpy(array).to(kind) for name, array in tiny.rounded(weights, dtype).items()}
    if form == "parameters":
        tree = {name: torch.nn.Parameter(value) for name, value in tree.items()}
    elif form == "state_dict":
        tree = OrderedDict(tree)
        tree._metadata = OrderedDict({"": {"version": 1}})
    elif form == "views":
        flat = torch.cat([value.flatten() for value in tree.values()])
        parts = torch.split(flat, [value.numel() for value in tree.values()])
        turned = {name: part.view(tree[name].shape) for name, part in zip(tree, parts, strict=True)}
        tree = {name: value.T.contiguous().T if value.ndim == 2 else value for name, value in turned.items()}
    for name in ("torch", "tiny"):
        (tmp_path / name).mkdir()
    torch.save(tree, tmp_path / "torch" / "a.pth", pickle_protocol=5 if form == "protocol 5" else 2)
    tiny.write_pth(tmp_path / "tiny" / "a.pth", weights, dtype)
    files = [tmp_path / name / "a.int8.safetensors" for name in ("torch", "tiny")]
    for file in files:
        assert rwkv("convert", file.with_name("a.pth")).exit_code == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_state_dict_with_prefix_and_parameters_needs_no_torch(tmp_path: Path) -> None:
    plain = {name: tensor(name, "F32", a.size, 0, a.shape, tiny.contiguous(a.shape)) for name, a in SMALL.items()}
    calls = {
        "_forward_module." + name: Call(Ref("torch._utils", "_rebuild_parameter"), value, True, {})
        for name, value in plain.items()
    }
    ordered, metadata = Ref("collections", "OrderedDict"), {"_metadata": {"": {"version": 1}}}
    body = tiny.pickled(calls)[2:-1].removeprefix(b"}")
    data = b"\x80\x02" + tiny.pickled(Call(ordered))[2:-1] + body + tiny.pickled(metadata)[2:-1] + b"b."
    tiny.write_zip(tmp_path / "a.pth", data, {name: tiny.raw(array, "F32") for name, array in SMALL.items()})
    got = naming.official(open_source(tmp_path / "a.pth"))
    assert list(got) == list(SMALL)
    for name, array in SMALL.items():
        np.testing.assert_array_equal(got[name].float32(), array)


@few
@given(
    axes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), max_size=4),
    offset=st.integers(0, 5),
    dtype=st.sampled_from(list(tiny.STORAGES)),
    rows=st.tuples(st.integers(0, 5), st.integers(0, 5)),
)
def test_any_strided_view_is_read(
    folder: Path, axes: list[tuple[int, int]], offset: int, dtype: str, rows: tuple[int, int]
) -> None:
    shape, strides = tuple(n for n, _ in axes), tuple(s for _, s in axes)
    numel = offset + 1 + sum(max(0, n - 1) * s for n, s in axes)
    base = np.arange(numel, dtype=np.float32)  # two tensors over one storage
    tree = {"a": tensor("0", dtype, numel, offset, shape, strides), "b": tensor("0", dtype, numel, 0, (numel,), (1,))}
    tiny.write_zip(folder / "strided.pth", tree, {"0": tiny.raw(base, dtype)})
    source = open_source(folder / "strided.pth")
    want = np.lib.stride_tricks.as_strided(base[offset:], shape, [s * 4 for s in strides])
    np.testing.assert_array_equal(source["a"].float32(), want)
    np.testing.assert_array_equal(source["b"].float32(), base)
    if shape:
        start, stop = min(rows[0], shape[0]), min(sum(rows), shape[0])
        np.testing.assert_array_equal(source["a"].float32(start, stop), want[start:stop])
    if 0 not in shape:
        tree["a"] = tensor("0", dtype, numel, offset + 1, shape, strides)
        tiny.write_zip(folder / "strided.pth", tree, {"0": tiny.raw(base, dtype)})
        with pytest.raises(FormatError, match="tensor a reaches past the end of its storage; download"):
            open_source(folder / "strided.pth")


@few
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(folder: Path, share: float) -> None:
    data = tiny.write_pth(folder / "whole.pth", SMALL).read_bytes()
    (folder / "cut.pth").write_bytes(data[: int(share * len(data))])
    with pytest.raises(FormatError, match=r"cut\.pth: .*download"):
        read_source(folder / "cut.pth")


@few
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
@pytest.mark.parametrize("part", ["pickle", "directory", "anywhere"])
def test_changed_bytes_are_refused_or_harmless(folder: Path, part: str, changes: list[tuple[float, int]]) -> None:
    path = tiny.write_pth(folder / "whole.pth", SMALL)
    target = folder / "changed.pth"
    content, storages = members(path)
    data = bytearray(content if part == "pickle" else path.read_bytes())
    first = data.index(b"PK\x01\x02") if part == "directory" else 0
    for share, byte in changes:
        data[first + int(share * (len(data) - first))] = byte
    if part == "pickle":
        tiny.write_zip(target, bytes(data), storages)  # with the right checksum
    else:
        target.write_bytes(data)
    read_or_refused(target)


CENTRAL = {"compression": (10, "<H"), "compress_size": (20, "<I"), "file_size": (24, "<I"), "both sizes": (20, "<Q"),
           "header_offset": (42, "<I")}  # fmt: skip
"""Where the fields of a zip's directory lie."""


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("file_size", 28, "storage '0' has the wrong size; download"),
        ("compress_size", 20, "storage '0' has the wrong size; download"),
        ("compression", 8, "'archive/data/0' in it is compressed; unpack"),
        ("compression", 99, "'archive/data/0' in it is compressed; unpack"),
        ("header_offset", 1, "(no data where the file says|broken or truncated torch file .*); download"),
        ("both sizes", 4000 << 32 | 4000, "tensor b reaches past the end of the file; download"),
        ("header_offset", 1 << 30, "(no data where the file says|broken or truncated torch file .*); download"),
    ],
)
def test_a_directory_that_lies_is_refused(rwkv: Run, tmp_path: Path, field: str, value: int, says: str) -> None:
    path = tmp_path / "a.pth"
    numel = 1000 if field == "both sizes" else 6
    tiny.write_zip(path, {"b": tensor("0", "F32", numel, 0, (6,), (1,))}, {"0": FLOATS})
    data = bytearray(path.read_bytes())
    at, kind = CENTRAL[field]
    struct.pack_into(kind, data, data.rindex(b"archive/data/0") - 46 + at, value)
    path.write_bytes(data)
    refused(rwkv("convert", path), path, says)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("change", [-9, -1, 1, 100, 1 << 20, 1 << 31])
def test_a_directory_in_the_wrong_place_is_refused(rwkv: Run, tmp_path: Path, change: int) -> None:
    path = tiny.write_pth(tmp_path / "a.pth", SMALL)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x05\x06") + 16
    struct.pack_into("<I", data, at, struct.unpack_from("<I", data, at)[0] + change)
    path.write_bytes(data)
    refused(rwkv("convert", path), path, "download it again")


STORAGE = Persistent(("storage", Ref("torch", "FloatStorage"), "0", "cpu", 6))
REBUILD = Ref("torch._utils", "_rebuild_tensor_v2")
OTHER = Persistent(("storage", Ref("torch", "LongStorage"), "0", "cpu", 6))


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({}, "holds an empty dictionary, not a dictionary of tensors"),
        ((tensor("0", "F32", 6, 0, (6,), (1,)),), "holds tuple, not a dictionary of tensors"),
        ({"model": {"a": 1}, "epoch": 3}, "entry 'model' is not a tensor; give a model's checkpoint"),
        ({"_strategy": "cpu fp32", "a": tensor("0", "F32", 6, 0, (6,), (1,))}, r"by ChatRWKV's convert_model\.py for"),
        ({"a\nb": tensor("0", "F32", 6, 0, (6,), (1,))}, r"a tensor has the name 'a\\nb'; download"),
        ({7: tensor("0", "F32", 6, 0, (6,), (1,))}, "the tensor 7 has a number for a name; give a model's checkpoint"),
        ({"a": tensor("0", "F32", 7, 0, (7,), (1,))}, "tensor a: storage '0' has the wrong size"),
        ({"a": tensor("0", "F16", 6, 0, (6,), (1,))}, "tensor a: storage '0' has the wrong size"),
        ({"a": tensor("1", "F32", 6, 0, (6,), (1,))}, r"tensor a: its data \(storage '1'\) is missing; download"),
        ({"a": tensor("0", "F32", 6, 0, (-6,), (1,))}, "size, stride or offset of a tensor is out of range"),
        ({"a": tensor("0", "F32", 6, 0, (6,), (-1,))}, "size, stride or offset of a tensor is out of range"),
        ({"a": tensor("0", "F32", 6, -1, (6,), (1,))}, "size, stride or offset of a tensor is out of range"),
        ({"a": tensor("0", "F32", 6, 0, (1 << 62,), (0,))}, "size, stride or offset of a tensor is out of range"),
        (
            {"a": tensor("0", "F32", 6, 0, (0, 1 << 40, 1 << 40), (1, 1, 1))},
            "a has the shape .*, larger than any weight",
        ),
        (
            {"a": tensor("0", "F32", 6, 0, (1 << 20, 5), (0, 1))},
            "describe tensors of 20971520 bytes; save plain copies",
        ),
        (
            {f"blocks.{i}": tensor("0", "F32", 6, 0, (4000,), (0,)) for i in range(200)},
            "describe tensors of 3200000 bytes; save plain copies",
        ),
        ({"a": tensor("0", "F32", 6, 0, (6,), (1, 1))}, "a tensor is described wrongly"),
        ({"a": Call(REBUILD, STORAGE, 0, 6, 1)}, "a tensor is described wrongly"),
        ({"a": Call(REBUILD, None, 0, (6,), (1,))}, "a tensor is described wrongly"),
        ({"a": Call(REBUILD, STORAGE)}, "broken or truncated torch file"),
        (
            {"a": Call(REBUILD, OTHER, 0, (6,), (1,))},
            "tensor a holds a 'LongStorage'; only float64, float32, float16 and",
        ),
        ({"a": Persistent(("storage", "FloatStorage", "0", "cpu", 6))}, "a storage is described wrongly"),
        ({"a": Persistent("0")}, "a storage is described wrongly"),
    ],
)
def test_what_is_not_a_dictionary_of_tensors_is_refused(rwkv: Run, tmp_path: Path, tree: Any, says: str) -> None:
    tiny.write_zip(tmp_path / "a.pth", tree, {"0": FLOATS})
    refused(rwkv("convert", tmp_path / "a.pth"), tmp_path / "a.pth", says)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"word/document.xml": b"<x/>"}, "a zip without torch's data.pkl"),
        ({"a/data.pkl": b"", "b/data.pkl": b""}, "a zip without torch's data.pkl"),
        ({"a/data.pkl": b"", "a/byteorder": b"big"}, "saved on a big-endian machine"),
        ({"a/data.pkl": b""}, "broken or truncated torch file .*; download it again"),
        ({"a/data.pkl": b"." * (9 << 20)}, "data.pkl' in it is larger than any checkpoint's"),
    ],
)
def test_another_zip_is_refused(rwkv: Run, tmp_path: Path, names: dict[str, bytes], says: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    refused(rwkv("convert", tmp_path / "a.pth"), tmp_path / "a.pth", says)


def test_a_compressed_pickle_is_not_unpacked(rwkv: Run, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))
    refused(rwkv("convert", tmp_path / "a.pth"), "'a/data.pkl' in it is compressed; unpack and zip again")


DEEP = b"N" + b"\x85" * 300_000
"""A tuple in a tuple in a tuple …: hashing it overruns the stack."""
WIDE = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
"""A tuple that holds the one before twice, sixty times over: hashing it never ends."""


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"),
        ("subprocess", "Popen"), ("torch", "load"), ("torch.storage", "_load_from_bytes"), ("torch", "device"),
        ("torch._utils", "_rebuild_from_type_v2"), ("torch.serialization", "Storage"), ("collections", "deque"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["reduce", "inst", "obj", "newobj", "stack"])
def test_nothing_in_a_pickle_is_run(
    rwkv: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, how: str
) -> None:
    ran: list[object] = []
    for patched in ("os.system", "posix.system", "subprocess.Popen", "builtins.eval", "builtins.exec"):
        monkeypatch.setattr(patched, ran.append)
    call, text = f"c{module}\n{name}\n".encode(), tiny.pickled("touch ran")[2:-1]
    data = {
        "reduce": call + text + b"\x85R",
        "inst": b"(" + text + b"i" + call[1:],
        "obj": b"(" + call + text + b"o",
        "newobj": call + text + b"\x85\x81",
        "stack": tiny.pickled(module)[2:-1] + tiny.pickled(name)[2:-1] + b"\x93" + text + b"\x85R",
    }[how]
    tiny.write_zip(tmp_path / "a.pth", b"\x80\x04" + data + b".", {})
    result = rwkv("convert", tmp_path / "a.pth")
    monkeypatch.undo()
    says = {"inst": "it uses INST", "obj": "it asks for", "newobj": "it asks for"}.get(how, f"'{module}.{name}'")
    refused(result, tmp_path / "a.pth", "its pickle is refused, and nothing in it was run: ", says)
    assert not ran
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pth"]


@pytest.mark.parametrize("tuples", [DEEP, WIDE], ids=["deep", "wide"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"}", b"Ns"),
        (b"}(", b"Nu"),
        (b"ccollections\nOrderedDict\n](](", b"Neae\x85R"),
        (b"X\x01\0\0\0a", b"\x93"),
        (b"", b"Q"),
        (b"}X\x01\0\0\0a", b"s"),
    ],
    ids=["SETITEM", "SETITEMS", "OrderedDict", "STACK_GLOBAL", "BINPERSID", "value"],
)
def test_a_pickle_cannot_crash_or_hang_the_reader(tmp_path: Path, tuples: bytes, before: bytes, after: bytes) -> None:
    tiny.write_zip(tmp_path / "a.pth", b"\x80\x02" + before + tuples + after + b".", {})
    code = "import sys, pathlib, rwkv_cli.quant.opening as s; s.open_source(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-P", "-c", code, tmp_path / "a.pth"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert re.search(r"FormatError: \S+a\.pth: ", done.stderr)
