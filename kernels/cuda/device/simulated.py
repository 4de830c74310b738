"""The functions of `intrinsics` in Python, for numba's CUDA simulator. Addresses are the host's."""

import ctypes
import sys
import threading
from typing import Any

import numpy as np
from numba.cuda.np.numpy_support import as_dtype
from numba.cuda.simulator import kernelapi
from numpy.typing import NDArray

from rwkv_cli.numbers import LEVELS

_LANES: list[list[Any]] = [[0] * 1024, [0] * 1024]
"""What each thread of the running block shows its warp. Two lists in turns: no thread can be two exchanges ahead."""


def _shared_array(shared: Any, shape: Any, dtype: Any, alignment: int = 0) -> Any:  # noqa: ARG001
    """A block's array for the line of a kernel that asks for it. The simulator's own takes no alignment."""
    frame = sys._getframe(1)
    return shared._allocations.setdefault((frame.f_code, frame.f_lineno), np.empty(shape, as_dtype(dtype)))


setattr(kernelapi.FakeCUDAShared, "array", _shared_array)  # noqa: B010 - mypy takes no assignment to a method


def _wait_for_warp(thread: Any) -> None:
    """Wait until the other lanes of a thread's warp are as far. numba's own threads know no warps."""
    if hasattr(thread, "syncwarp"):
        thread.syncwarp()
    else:
        warps = vars(thread._manager).setdefault("warps", {})
        warps.setdefault(thread.threadIdx.x // 32, threading.Barrier(32, timeout=60)).wait()


def _of_warp(value: Any) -> tuple[NDArray[Any], int]:
    """The values of a warp's lanes, and which lane this is."""
    thread: Any = threading.current_thread()
    tid, turn = thread.threadIdx.x, getattr(thread, "exchanges", 0) % 2
    thread.exchanges = turn + 1
    _LANES[turn][tid] = value
    _wait_for_warp(thread)
    return np.array(_LANES[turn][tid // 32 * 32 : tid // 32 * 32 + 32]), tid % 32


def warp_sum(value: Any) -> Any:
    values, lane = _of_warp(value)
    for distance in (16, 8, 4, 2, 1):
        values = values + values[np.arange(32) ^ distance]
    return values[lane]


def warp_sums(values: Any, count: int) -> None:
    sums, lane = _of_warp(values[:count].copy())
    for distance in (16, 8, 4, 2, 1):
        sums = sums + sums[np.arange(32) ^ distance]
    values[:count] = sums[lane]


def warp_max(value: Any) -> Any:
    values, _ = _of_warp(value)
    return np.fmax.reduce(values)


def largest_of_warp(value: int) -> int:
    values, _ = _of_warp(value)
    return int(values.max())


def quad_sum(value: Any) -> Any:
    values, lane = _of_warp(value)
    values = values + values[np.arange(32) ^ 1]
    return (values + values[np.arange(32) ^ 2])[lane]


def wait_for_previous() -> None:
    pass


def let_next_begin() -> None:
    pass


def prefetch(address: int) -> None:
    i64(address)  # it must be memory


def f32(address: int) -> np.float32:
    return np.float32(ctypes.c_float.from_address(int(address)).value)


def i8(address: int) -> int:
    return ctypes.c_int8.from_address(int(address)).value


def f16(address: int) -> np.float32:
    return half(ctypes.c_uint16.from_address(int(address)).value)


def bf16(address: int) -> np.float32:
    return float_of(ctypes.c_uint16.from_address(int(address)).value << 16)


def i16(address: int) -> int:
    return ctypes.c_int16.from_address(int(address)).value


def i32(address: int) -> int:
    return ctypes.c_int32.from_address(int(address)).value


def i64(address: int) -> int:
    return ctypes.c_int64.from_address(int(address)).value


def put_f32(address: int, value: Any) -> None:
    ctypes.c_float.from_address(int(address)).value = float(value)


def put_f64(address: int, value: Any) -> None:
    ctypes.c_double.from_address(int(address)).value = float(value)


def put_i32(address: int, value: int) -> None:
    ctypes.c_int32.from_address(int(address)).value = int(value)  # cut to 32 bits


def put_i16(address: int, value: int) -> None:
    ctypes.c_int16.from_address(int(address)).value = int(value)


def put_u8(address: int, value: int) -> None:
    ctypes.c_uint8.from_address(int(address)).value = int(value)


def words(address: int) -> tuple[int, ...]:
    assert address % 16 == 0, "a load of 16 bytes must be aligned"
    return tuple((ctypes.c_int32 * 4).from_address(int(address)))


def four(array: Any, first: int) -> tuple[Any, ...]:
    assert first % 4 == 0, "a load of 16 bytes must be aligned"
    return tuple(array[first + i] for i in range(4))


four_words = four


def shared_address(array: Any) -> int:
    return int(array.ctypes.data)


def copy_ahead(at: int, address: int) -> tuple[int, ...]:
    """The words are poison until they are waited for."""
    place = _at(at, 16).view(np.int32)
    place[:] = -1
    _copies_of_thread()[-1].append((place, words(address)))
    return (0, 0, 0, 0)


def put_copied(at: int, copied: tuple[int, ...]) -> None:
    pass


def end_of_copies() -> None:
    _copies_of_thread().append([])


def wait_for_copies() -> None:
    groups = _copies_of_thread()
    while len(groups) > 2 + 1:
        for place, copied in groups.pop(0):
            place[:] = copied


def _copies_of_thread() -> list[list[Any]]:
    """The groups of copies under way of the running thread. The last one is still open."""
    thread: Any = threading.current_thread()
    if not hasattr(thread, "copies"):
        thread.copies = [[]]
    groups: list[list[Any]] = thread.copies
    return groups


def half(word: int) -> np.float32:
    return np.float32(np.array(int(word) & 0xFFFF, np.uint16).view(np.float16))


def bits(x: Any) -> int:
    return int(np.float32(x).view(np.int32))


def float_of(bits: int) -> np.float32:
    return np.float32(np.array(int(bits) & 0xFFFFFFFF, np.uint32).view(np.float32))


def through_half(x: Any) -> np.float32:
    with np.errstate(over="ignore"):
        return np.float32(np.float16(x))


def rounded(x: Any) -> int:
    return 0 if x != x else int(np.rint(np.clip(np.float64(x), -(2**31), 2**31 - 1)))


def half_bits(x: Any) -> int:
    with np.errstate(over="ignore"):
        return int(np.float16(x).view(np.uint16))


def _halves(word: int) -> NDArray[np.float16]:
    return np.array([low_word(word)], np.int32).view(np.float16)


def halves_product(x: int, y: int) -> int:
    return int((_halves(x) * _halves(y)).view(np.int32)[0])


def halves_difference(x: int, y: int) -> int:
    return int((_halves(x) - _halves(y)).view(np.int32)[0])


def low_word(x: int) -> int:
    return int(np.array(int(x) & 0xFFFFFFFF, np.uint32).view(np.int32))


def permute(first: int, second: int, selectors: int) -> int:
    table = np.array([low_word(first), low_word(second)], np.int32).view(np.int8)
    nibbles = [int(selectors) >> (4 * i) & 15 for i in range(4)]
    chosen = [table[n & 7] if n < 8 else table[n & 7] >> 7 for n in nibbles]
    return int(np.array(chosen, np.int8).view(np.int32)[0])


def _bytes(word: int) -> NDArray[np.int64]:
    return np.array([word], np.int32).view(np.int8).astype(np.int64)


def dp4a(a: int, b: int, c: int) -> int:
    return int(c + (_bytes(a) * _bytes(b)).sum())


def _at(address: int, size: int) -> NDArray[np.uint8]:
    raw: Any = (ctypes.c_uint8 * size).from_address(int(address))
    return np.frombuffer(raw, np.uint8)


def _weights(address: int, bits: int) -> NDArray[np.int8]:
    """The int8 of a fragment of weights, decoded where they are codes: [8 (g), 4 (t), 4 (word), 4 (byte)]."""
    if bits == 8:
        return _at(address, 512).view(np.int8).reshape(8, 4, 4, 4)
    low = _at(address, 256).reshape(8, 4, 4, 2)
    code = np.stack([low & 15, low >> 4], -1).reshape(8, 4, 4, 4)
    if bits > 4:
        rest = np.unpackbits(_at(address + 256, 64 * (bits - 4)), bitorder="little").reshape(8, 4, 4, 4, bits - 4)
        code |= (rest @ np.array([16, 32][: bits - 4], np.uint8)).swapaxes(2, 3)
    return np.array(LEVELS[bits], np.int8)[code]


def products(weights: Any, levels: Any, lane: int, weights_at: int, bits: int, levels_at: int) -> tuple[int, ...]:
    high, low = _sums_of(weights, levels, lane, weights_at, bits, _at(levels_at, 512))
    return tuple((256 * high + low).ravel().tolist())


def products_8(weights: Any, levels: Any, lane: int, weights_at: int, bits: int, levels_at: int) -> tuple[int, ...]:
    (sums,) = _sums_of(weights, levels[:2], lane, weights_at, bits, _at(levels_at, 256))
    return tuple(sums.ravel().tolist())


def _sums_of(weights: Any, levels: Any, lane: int, weights_at: int, bits: int, stored: NDArray[np.uint8]) -> Any:
    """The sums of each plane that a lane gets. What it was given must be its own numbers of the stored fragments."""
    g, t = int(lane) // 4, int(lane) % 4
    w, a = _weights(weights_at, bits), stored.view(np.int8).reshape(8, 4, -1, 4)
    for given, there in ((weights, w), (levels, a)):
        assert np.array(given, np.int32).tobytes() == there[g, t].tobytes(), "a lane has other numbers than its own"
    return _plane_sums(w, a, g, t)


def plane_products(weights: Any, levels: Any, sums: Any) -> tuple[int, ...]:
    shown, lane = _of_warp((weights, levels))
    w, a = (shown.astype(np.int32)[:, i].copy().view(np.int8).reshape(8, 4, 4, 4) for i in range(2))
    high, low = _plane_sums(w, a, lane // 4, lane % 4)
    return tuple(low_word(onto + n) for onto, n in zip(sums, (high + low).ravel().tolist(), strict=True))


def half_products(weights: Any, levels: Any, sums: Any) -> tuple[Any, ...]:
    shown, lane = _of_warp((*weights, *levels))
    halves = shown.astype(np.int32).view(np.float16).astype(np.float32)
    # of each lane: columns in halves, pairs of columns, rows, two columns
    w, x = halves[:, :16].reshape(8, 4, 2, 2, 2, 2), halves[:, 16:].reshape(8, 4, 2, 2, 2)
    g, t = lane // 4, lane % 4
    rows = w[g].transpose(3, 0, 1, 2, 4).reshape(2, 32)
    tokens = x[2 * t : 2 * t + 2].reshape(2, 32)
    return tuple(np.float32(onto) + n for onto, n in zip(sums, (rows @ tokens.T).ravel(), strict=True))


def _plane_sums(w: NDArray[np.int8], a: NDArray[np.int8], g: int, t: int) -> Any:
    """The sums of each plane that lane 4g + t gets, [planes, 2 (row), 2 (token)], of two fragments."""
    # words 0 and 2 are columns 4t … 4t + 3 and 16 more of row g, words 1 and 3 those of row g + 8
    rows = w[g].reshape(4, 2, 2, 4).transpose(2, 0, 1, 3).reshape(2, 32).astype(np.int64)
    tokens = a[2 * t : 2 * t + 2].reshape(2, 4, -1, 2, 4).transpose(2, 1, 3, 4, 0).reshape(-1, 32, 2).astype(np.int64)
    return rows @ tokens


def exp(x: Any) -> Any:
    with np.errstate(all="ignore"):
        return np.exp(x)


def tanh(x: Any) -> Any:
    return np.tanh(x)


def log(x: Any) -> Any:
    with np.errstate(all="ignore"):
        return np.log(x)


def sqrt(x: Any) -> Any:
    with np.errstate(all="ignore"):
        return np.sqrt(x)
