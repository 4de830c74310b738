"""Reads torch's pickles without loading them.

A loop reads a pickle's opcodes and knows only those that torch.save writes, and only the names that tensors need. The
results are descriptions of tensors. Nothing in the file is executed.
"""

import pickletools
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

from rwkv_cli.errors import FormatError
from rwkv_cli.quant.dtypes import BITS
from rwkv_cli.quant.source import MAX_DIMENSIONS, check_name, check_shape

DAMAGED = "broken or truncated torch file"
MAX_PICKLE = 8 << 20
"""Bytes of the largest pickle that a checkpoint may have."""

_DTYPES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64"}

_OTHER_SIZES = {
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}
"""Bytes of one number of the kinds that no weight has."""

_WRAPPERS = ("state_dict", "model", "module")
"""Entries under which training programs keep the model: Lightning, training loops and DeepSpeed."""


class _RefusedError(Exception):
    """A pickle asks for something that it does not get."""


class _StorageType(NamedTuple):
    name: str


class Storage(NamedTuple):
    """Numbers of one kind that tensors lie in."""

    dtype: str
    """A key of BITS, or torch's name of a kind that no weight has."""
    key: str
    numel: int

    @property
    def item_size(self) -> int | None:
        """Bytes of one number, or None for a kind that is not known."""
        return BITS[self.dtype].itemsize if self.dtype in BITS else _OTHER_SIZES.get(self.dtype)


class View(NamedTuple):
    """A tensor: a part of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> View:
    ok = isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    if not ok or not len(shape) == len(strides) <= MAX_DIMENSIONS:
        raise _RefusedError("a tensor is described wrongly")
    if any(type(n) is not int or not 0 <= n < 1 << 48 for n in (offset, *shape, *strides)):
        raise _RefusedError("a size, stride or offset of a tensor is out of range")
    # requires_grad and hooks come first, then bits such as "negative" that change the values
    if any(more[2:]):
        raise _RefusedError("a tensor carries metadata that is not supported; save a plain copy of it (.clone())")
    return View(storage, offset, shape, strides)


def _parameter(view: Any, *_: Any) -> Any:
    return view


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): lambda: {},
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    ("__builtin__", "set"): tuple,
    ("builtins", "set"): tuple,
}
"""The functions that a pickle may call, by the names of what they stand for. A set becomes a tuple."""

_KNOWN = {
    "_rebuild_tensor_v3": "it holds numbers of a kind such as float8; save it again in bfloat16",
    "_rebuild_qtensor": "it holds quantized tensors; give the model as it was before",
}
"""Functions for tensors that no model here has, and what to do about them."""


def _named(module: Any, name: Any) -> Any:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise _RefusedError("a name in it is not text")
    if (module, name) in _ALLOWED:
        return _ALLOWED[module, name]
    if module == "torch" and name.endswith("Storage"):
        return _StorageType(name)
    if module == "torch._utils" and name in _KNOWN:
        raise _RefusedError(_KNOWN[name])
    asked = f"it asks for {f'{module}.{name}'!r:.80}, which no tensor needs"
    if name[:1].isupper():  # a class
        asked += "; a whole module? save its weights alone, with torch.save(model.state_dict(), PATH)"
    raise _RefusedError(asked)


def _storage(pid: Any) -> Storage:
    match pid:
        case ("storage", _StorageType(name), str(key), _, int(numel)):
            return Storage(_DTYPES.get(name, name), key, numel)
        case ("storage", _StorageType(name), str(key), _, int(numel), None):  # before torch 1.6
            return Storage(_DTYPES.get(name, name), key, numel)
    raise _RefusedError("a storage is described wrongly")


def described(path: Path, file: IO[bytes] | bytes, storages: dict[str, Storage] | None = None) -> Any:
    """The value that the next pickle of a file describes. Its storages are added to `storages` by their keys.

    Raises FormatError for one that no checkpoint has."""
    try:
        return _interpret(file, {} if storages is None else storages)
    except _RefusedError as error:
        raise FormatError(f"{path}: its pickle is refused, and nothing in it was run: {error}") from None
    except Exception:  # hostile bytes may raise anything, though never by a call of their choice
        raise FormatError(f"{path}: {DAMAGED} (its pickle makes no sense); download it again") from None


def _interpret(file: IO[bytes] | bytes, storages: dict[str, Storage]) -> Any:
    """The value that a pickle of protocol 2 to 5 describes.

    Keys must be strings or integers, since hashing a deep tuple would crash.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def popped(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(popped(len(stack) - int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(popped(marks.pop())))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "SETITEM" | "SETITEMS":
                items = popped(marks.pop() if opcode.name == "SETITEMS" else len(stack) - 2)
                if not all(type(key) in (str, int) for key in items[::2]):
                    raise _RefusedError("a key of a dictionary is neither text nor a number")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "APPEND" | "APPENDS":
                items = popped(marks.pop() if opcode.name == "APPENDS" else len(stack) - 1)
                stack[-1] += items
            case "GLOBAL":
                stack.append(_named(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_named(*popped(len(stack) - 2)))
            case "BINPERSID":
                storage = _storage(stack.pop())
                storages[storage.key] = storage
                stack.append(storage)
            case "REDUCE":
                function, arguments = popped(len(stack) - 2)
                stack.append(function(*arguments))
            case "BUILD":
                stack.pop()  # a state_dict has its _metadata here
            case "STOP":
                return stack.pop()
            case _:
                raise _RefusedError(f"it uses {opcode.name}, which no checkpoint needs")
    return None


def tensors_of(path: Path, tree: Any) -> dict[str, View]:
    """The tensors of a model that was saved as a dictionary, or as an entry of what a training program saves.

    Single integers, text and the like beside the tensors are left out. Raises FormatError for anything else.
    """
    inner = [tree[name] for name in _WRAPPERS if name in tree] if isinstance(tree, dict) else []
    tree = next((each for each in inner if _holds_tensors(each)), tree)
    if not isinstance(tree, dict) or not tree:
        what = "an empty dictionary" if tree == {} else type(tree).__name__
        raise FormatError(f"{path}: holds {what}, not a dictionary of tensors; give a model's checkpoint")
    if "_strategy" in tree:
        raise FormatError(f"{path}: made by ChatRWKV's convert_model.py for one strategy; give the original .pth")
    if not _holds_tensors(tree):
        raise FormatError(f"{path}: entry {next(iter(tree))!r:.80} is not a tensor; give a model's checkpoint")
    views: dict[str, View] = {}
    for name, view in tree.items():
        if not isinstance(view, View):
            continue
        if not isinstance(name, str):
            raise FormatError(f"{path}: the tensor {name!r:.80} has a number for a name; give a model's checkpoint")
        check_name(path, name)
        check_shape(path, name, view.shape)
        if view.storage.dtype in _DTYPES.values():
            views[name] = view
        elif prod(view.shape) != 1:
            raise FormatError(
                f"{path}: tensor {name} holds a {view.storage.dtype!r:.80}; only float64, float32, float16 and "
                "bfloat16 can be read"
            )
    return views


def _holds_tensors(tree: Any) -> bool:
    return isinstance(tree, dict) and any(isinstance(value, View) for value in tree.values())
