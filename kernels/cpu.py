"""The CPU's Backend: allocates outputs and calls the kernels. Contracts are in `backend.Backend`."""

from typing import Any, NamedTuple

import numpy as np
from numba import get_num_threads
from numpy.typing import NDArray

from rwkv_cli.kernels import elementwise, matmul, scores, wkv
from rwkv_cli.kernels.backend import Activation, Array, Starts

_ACTIVATIONS = {
    "sigmoid": elementwise.sigmoid,
    "silu": elementwise.silu,
    "tanh": elementwise.tanh,
    "relu_squared": elementwise.relu_squared,
}


class Int8Weight(NamedTuple):
    layout: str
    shape: tuple[int, int]
    values: NDArray[np.int8]
    scales: NDArray[np.uint16]
    unit: int


class FloatWeight(NamedTuple):
    dtype: str
    bits: NDArray[Any]


Weight = Int8Weight | FloatWeight

# below these, in numbers and in products, one thread is done before another would be awake
_SMALL = 1 << 15
_SMALL_PRODUCT = 1 << 18


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only view, so that kernels see one type of array whether it is mapped or not."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def int8_weight(
    layout: str, shape: tuple[int, int], values: NDArray[np.int8], scales: NDArray[np.uint16], unit: int
) -> Weight:
    return Int8Weight(layout, shape, _frozen(values), _frozen(scales), unit)


def float_weight(dtype: str, bits: NDArray[Any]) -> Weight:
    return FloatWeight(dtype, _frozen(bits))


def weight_size(weight: Weight) -> tuple[int, int, bool]:
    if isinstance(weight, FloatWeight):
        return weight.bits.nbytes, weight.bits.size, False
    return weight.values.nbytes + weight.scales.nbytes, weight.values.size, weight.layout == "columns"


def vector(values: Array) -> Array:
    return _frozen(values)


def embed(ids: NDArray[np.int64], table: Weight) -> Array:
    if isinstance(table, FloatWeight):
        bits: NDArray[Any] = table.bits[ids]
        if table.dtype == "F32":
            return np.asarray(bits, np.float32)
        if table.dtype == "F16":
            return np.asarray(bits.view(np.float16), np.float32)
        wide: NDArray[np.uint32] = np.left_shift(bits, 16, dtype=np.uint32)
        return wide.view(np.float32)
    q = table.values[ids].reshape(len(ids), -1, matmul.GROUP).astype(np.float32)
    scale = table.scales[ids].view(np.float16).astype(np.float32) * np.float32(2.0**table.unit)
    x = (q * scale[:, :, None]).reshape(len(ids), -1)
    return np.ascontiguousarray(x[:, : table.shape[1]])


def linear(x: Array, weight: Weight, activation: Activation = "") -> Array:
    if isinstance(weight, FloatWeight):
        y = np.empty((len(x), len(weight.bits)), np.float32)
        matmul.floats(weight.bits, ("F32", "BF16", "F16").index(weight.dtype), x, y, get_num_threads())
    else:
        y = _int8_linear(x, weight)
    if activation:
        _ACTIVATIONS[activation](y)
    return y


def _int8_linear(x: Array, weight: Int8Weight) -> Array:
    """The activations are rounded to int16 once, in groups, whatever the layout."""
    T, N, values, scales = len(x), weight.shape[0], weight.values, weight.scales
    groups = scales.shape[1]
    planes, kind = (2, np.int8) if matmul.VNNI else (1, np.int16)
    levels = np.empty((T, planes, groups * matmul.GROUP), kind)
    factors, offsets = np.empty((T, groups), np.float32), np.empty((T, groups), np.int32)
    # float16 scale bits stand for 2**-112 of their value as float32 bits
    unit, threads = np.float32(2.0 ** (112 + weight.unit)), get_num_threads()
    if x.size < _SMALL:
        matmul.quantize_one(x, unit, levels, factors, offsets)
    else:
        matmul.quantize_activations(x, unit, levels, factors, offsets, threads)
    y = np.zeros((T, values.shape[0] * values.shape[2]), np.float32)
    if weight.layout == "tile":
        if T * values.size < _SMALL_PRODUCT:
            matmul.tiles_small(values, scales, levels, factors, offsets, y)
        else:
            matmul.tiles(values, scales, levels, factors, offsets, y, threads)
    elif T == 1:
        matmul.columns_one(values, scales, levels, factors, y, threads)
    else:
        matmul.columns(values, scales, levels, factors, offsets, y)
    return y if y.shape[1] == N else np.ascontiguousarray(y[:, :N])


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    out = np.empty_like(x)
    elementwise.layer_norm(x, weight, bias, eps, out)
    return out


def take(x: Array, rows: NDArray[np.int64]) -> Array:
    return x[rows]


def token_shift(x: Array, starts: Starts, last: Array) -> Array:
    delta = np.empty_like(x)
    elementwise.shift(x, starts, last, delta)
    return delta


def lerp(x: Array, delta: Array, mix: Array) -> Array:
    out = np.empty_like(x)
    elementwise.lerp(x, delta, mix, out)
    return out


def round_to(x: Array, dtype: str) -> None:
    if dtype == "F16":
        x[:] = x.astype(np.float16)
    elif dtype == "BF16":
        bits = x.view(np.uint32)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits &= 0xFFFF0000


def add(x: Array, y: Array) -> None:
    elementwise.add(x, y)


def multiply(x: Array, y: Array) -> None:
    elementwise.multiply(x, y)


def split(x: Array, parts: int) -> list[Array]:
    return [np.ascontiguousarray(part) for part in np.split(x, parts, axis=1)]


def decay(x: Array) -> None:
    elementwise.decay(x)


def group_norm(x: Array, weight: Array, bias: Array, heads: int, eps: float) -> None:
    elementwise.group_norm(x, weight, bias, heads, eps)


def wkv4(k: Array, v: Array, w: Array, u: Array, starts: Starts, state: Array) -> Array:
    y = np.empty_like(k)
    wkv.wkv4(k, v, w, u, starts, state, y)
    return y


def wkv6(r: Array, k: Array, v: Array, w: Array, u: Array, starts: Starts, state: Array) -> Array:
    y = np.empty_like(r)
    wkv.wkv6(r, k, v, w, u, starts, state, y)
    return y


def delta_terms(k: Array, w: Array, a: Array, k_k: Array, k_a: Array, heads: int) -> tuple[Array, Array]:
    kappa, beta = np.empty_like(k), np.empty_like(k)
    elementwise.delta_terms(k, w, a, k_k, k_a, heads, kappa, beta)
    return kappa, beta


def blend(v: Array, first: Array, gate: Array) -> None:
    elementwise.blend(v, first, gate)


def wkv7(r: Array, w: Array, k: Array, v: Array, kappa: Array, beta: Array, starts: Starts, state: Array) -> Array:
    y = np.empty_like(r)
    wkv.wkv7(r, w, k, v, kappa, beta, starts, state, y)
    return y


def bonus(y: Array, r: Array, k: Array, v: Array, r_k: Array) -> None:
    elementwise.bonus(y, r, k, v, r_k)


def cross_entropy(logits: Array, targets: NDArray[np.int64]) -> NDArray[np.float64]:
    nll = np.empty(len(logits))
    scores.cross_entropy(logits, targets, nll)
    return nll


def divergence(p: Array, q: Array) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    kl, same = np.empty(len(p)), np.empty(len(p), np.bool_)
    scores.divergence(p, q, kl, same)
    return kl, same
