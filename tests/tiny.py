"""Small random checkpoints in the official naming, and writers for them that need no torch."""

import io
import json
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import Result
from numpy.typing import NDArray

VERSIONS = ("4", "5.0", "5.1", "5.2", "6", "7", "7a", "8-rc00")
Tensors = dict[str, NDArray[np.float32]]


def weights(version: str, layers: int = 3, width: int = 48, vocab: int = 300, head: int = 16, ffn: int = 96,
            seed: int = 0) -> Tensors:  # fmt: skip
    """A checkpoint's tensors, float32, spread like a trained model's: decay over its whole range, mixes in [0, 1]."""
    rng = np.random.default_rng(seed)
    D, H = width, width // head
    out: Tensors = {}

    def normal(*shape: int, std: float = 1.0) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) * std).astype(np.float32)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> NDArray[np.float32]:
        return rng.uniform(low, high, shape).astype(np.float32)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> NDArray[np.float32]:
        return normal(rows, columns, std=gain / columns**0.5)

    def norm(name: str) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = uniform(D, low=0.7, high=1.3), normal(D, std=0.05)

    out["emb.weight"] = normal(vocab, D, std=0.5)
    for i in range(layers):
        block = f"blocks.{i}"
        a, f = f"{block}.att.", f"{block}.ffn."
        for name in (*(["ln0"] if i == 0 else []), "ln1", "ln2"):
            norm(f"{block}.{name}")
        if version == "4":
            out[a + "time_decay"], out[a + "time_first"] = uniform(D, low=-6, high=2), normal(D, std=0.5)
        elif version[0] == "5":
            dims = (H, head) if version == "5.2" else (H,)
            out[a + "time_decay"] = uniform(*dims, low=-6, high=1)
            out[a + ("time_first" if version == "5.0" else "time_faaaa")] = normal(*dims, std=0.3)
        if version[0] in "45":
            for x in "kvr" if version in ("4", "5.0", "5.0r2") else "kvrg":
                out[a + f"time_mix_{x}"] = uniform(1, 1, D)
            for x in "kr":
                out[f + f"time_mix_{x}"] = uniform(1, 1, D)
        elif version == "6":
            mix, decay = 8, 12
            for x in "xwkvrg":
                out[a + f"time_maa_{x}"] = uniform(1, 1, D)
            out[a + "time_maa_w1"], out[a + "time_maa_w2"] = matrix(D, 5 * mix), normal(5, mix, D, std=0.1)
            out[a + "time_decay"] = uniform(1, 1, D, low=-6, high=1)
            out[a + "time_decay_w1"], out[a + "time_decay_w2"] = matrix(D, decay), matrix(decay, D, 0.5)
            out[a + "time_faaaa"] = normal(H, head, std=0.3)
            for x in "kr":
                out[f + f"time_maa_{x}"] = uniform(1, 1, D)
        else:
            for x in "rwkvag":
                out[a + f"x_{x}"] = uniform(1, 1, D)
            for x, low, high, rank in (("w", -6, 0, 8), ("a", -1, 1, 12), ("v", -1, 2, 20), ("g", 0, 0, 24)):
                if x != "g":
                    out[a + f"{x}0"] = uniform(1, 1, D, low=low, high=high)
                out[a + f"{x}1"], out[a + f"{x}2"] = matrix(D, rank), matrix(rank, D)
            out[a + "k_k"], out[a + "k_a"] = uniform(1, 1, D, low=0.6, high=1.1), uniform(1, 1, D, low=0.8, high=1.2)
            out[a + "r_k"] = normal(H, head, std=0.1)
            out[f + "x_k"] = uniform(1, 1, D)
        gate = ["gate"] if version in ("5.1", "5.2", "6") else []
        for x in ("receptance", "key", "value", "output", *gate):
            out[a + f"{x}.weight"] = matrix(D, D)
        if version != "4":
            norm(a + "ln_x")
        out[f + "key.weight"], out[f + "value.weight"] = matrix(ffn, D), matrix(D, ffn)
        if version[0] in "456":
            out[f + "receptance.weight"] = matrix(D, D)
        if version == "7a":
            rank = 6
            out[f + "s_emb.weight"], out[f + "s_emb_x.weight"] = normal(vocab, rank**2, std=0.5), matrix(rank**2, D)
            out[f + "s1"], out[f + "s2"] = matrix(D, rank), matrix(rank, ffn)
            out[f + "s0"] = uniform(1, 1, ffn, low=0.5, high=1.5)
        if version == "8-rc00":
            out[f + "enn.weight"] = normal(vocab, D)
    norm("ln_out")
    out["head.weight"] = matrix(vocab, D)
    return out


def rounded(tensors: Tensors, dtype: str) -> Tensors:
    """The values that these have once stored as F32, F16 or BF16."""
    if dtype == "F32":
        return dict(tensors)
    if dtype == "F16":
        return {name: a.astype(np.float16).astype(np.float32) for name, a in tensors.items()}
    return {name: (a.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, a in tensors.items()}


def raw(array: NDArray[np.float32], dtype: str) -> bytes:
    """Bytes of an array as stored; BF16 truncates."""
    if dtype == "BF16":
        return (np.ascontiguousarray(array).view(np.uint32) >> 16).astype("<u2").tobytes()
    return array.astype("<f4" if dtype == "F32" else "<f2").tobytes()


STORAGES = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}


class Ref:
    """A name that the pickle refers to without it being imported here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Call:
    """A call that loading the pickle asks for."""

    def __init__(self, function: Ref, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments


class Persistent:
    """A persistent id."""

    def __init__(self, value: Any) -> None:
        self.value = value


def pickled(value: Any) -> bytes:
    """Pickle protocol 2 of dicts, tuples, strings, ints, bools, None, and the three classes above."""
    return b"\x80\x02" + _encode(value) + b"."


def _encode(value: Any) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return pickle.dumps(value, 2)[2:-1]
    if isinstance(value, str):
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_encode, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(_encode(k) + _encode(v) for k, v in value.items()) + b"u"
    if isinstance(value, Ref):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        return _encode(value.function) + _encode(tuple(value.arguments)) + b"R"
    if isinstance(value, Persistent):
        return _encode(value.value) + b"Q"
    raise TypeError(type(value))


def tensor(key: str, dtype: str, numel: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Call:
    """A tensor as torch's pickles describe it: a view of storage `key` of `numel` elements."""
    storage = Persistent(("storage", Ref("torch", STORAGES[dtype]), key, "cpu", numel))
    hooks = Call(Ref("collections", "OrderedDict"))
    return Call(Ref("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, strides, False, hooks)


def write_zip(path: Path, tree: Any, storages: dict[str, bytes], name: str = "archive") -> None:
    """A `.pth` from its pickled tree (bytes as they are) and storages."""
    data = tree if isinstance(tree, bytes) else pickled(tree)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{name}/data.pkl", data)
        archive.writestr(f"{name}/byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"{name}/data/{key}", content)
        archive.writestr(f"{name}/version", "3\n")
    path.write_bytes(buffer.getvalue())


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


def write_pth(path: Path, tensors: Tensors, dtype: str = "BF16", prefix: str = "") -> Path:
    """A torch checkpoint as torch.save writes it."""
    tree, storages = {}, {}
    for i, (name, array) in enumerate(tensors.items()):
        tree[prefix + name] = tensor(str(i), dtype, array.size, 0, array.shape, contiguous(array.shape))
        storages[str(i)] = raw(array, dtype)
    write_zip(path, tree, storages)
    return path


def write_safetensors(path: Path, tensors: Tensors, dtype: str = "BF16") -> Path:
    """The same as a safetensors file, written by its specification."""
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        content = raw(array, dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refused(result: Result, *parts: object) -> None:
    """A command ended with one sentence on standard error that has these parts in this order, and nothing else."""
    assert (result.exit_code, result.stdout) == (1, "")
    says = "(Compiling kernels .*\n)?Error: .*" + ".*".join(map(str, parts)) + ".*\n"
    assert re.fullmatch(says, result.stderr), result.stderr


def wrong(result: Result, says: str, code: int = 1) -> None:
    """A command wrote nothing to standard output and one error to standard error, beside what else it said there."""
    assert (result.exit_code, result.stdout) == (code, "")
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert says in errors[0]


def facts(result: Result) -> dict[str, Any]:
    """Return the object that --json printed."""
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found
