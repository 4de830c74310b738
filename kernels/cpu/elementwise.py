"""Rows in and out of the matrix products: embedding, norms, token shift, activations. float32 [T, D], a row a token.

A loop that sums never stores floats as well. LLVM would put a test for overlapping arrays before it and a second,
scalar loop behind that, and where arrays happen to lie would decide in which order the sum is taken.
"""

from typing import NamedTuple

import numpy as np

from rwkv_cli.kernels.cpu.args import F32, F32_1, F32_2, F32_3, I8_2, I64_1, U16_2, U32_2, Int, unpack
from rwkv_cli.kernels.cpu.compile import FIXED_ORDER, function, kernel
from rwkv_cli.kernels.cpu.llvm.bits import bits_of, float_of
from rwkv_cli.numbers import GROUP


@function(FIXED_ORDER)
def exp(x):
    """e^x to 2 units in the last place, in a form that loops over it become vectors (the library's does not).

    x = n ln 2 + r, |r| ≤ ln 2 / 2; e^r by a polynomial (Cephes, expf.c), 2^n by way of the exponent. 0 below the
    smallest normal number.
    """
    shifted = x * np.float32(1.44269504) + np.float32(12582912)  # 1.5 · 2^23: n is in the lowest bits
    n = shifted - np.float32(12582912)
    r = x - n * np.float32(0.693359375)
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1)
    y = float_of(bits_of(p) + (bits_of(shifted) << np.int32(23)))
    y = np.float32(0) if x < np.float32(-87.33) else y
    y = np.float32(np.inf) if x > np.float32(88.37) else y
    return x if x != x else y


@function()
def address_of(x):
    """The address of an array as int64. numba's own is unsigned, and with a signed number it becomes a float."""
    return np.int64(x.ctypes.data)


@function()
def span(part, parts, n):
    """Split n things evenly: the range that part `part` of `parts` has."""
    return part * n // parts, (part + 1) * n // parts


@function()
def fill(weights, room):
    """Put weights, fewer than a group, and zeros to `room` [32]. Returns its address."""
    room[:] = 0
    for i in range(len(weights)):
        room[i] = weights[i]
    return address_of(room)


@function()
def activate(x, activation):
    """ACTIVATIONS[activation] of each element of x [n], in place. NaN stays NaN."""
    n = len(x)
    if activation == 1:
        for i in range(n):
            x[i] = np.float32(1) / (np.float32(1) + exp(-x[i]))
    elif activation == 2:
        for i in range(n):
            x[i] /= np.float32(1) + exp(-x[i])
    elif activation == 3:
        for i in range(n):
            x[i] = np.tanh(x[i])
    elif activation == 4:
        for i in range(n):
            x[i] = np.float32(0) if x[i] <= 0 else x[i] * x[i]
    elif activation == 5:
        for i in range(n):
            x[i] = exp(-exp(x[i]))
    elif activation == 6:
        for i in range(n):
            x[i] = exp(np.float32(-0.606530659712633) / (np.float32(1) + exp(-x[i])))


class EmbedInt8Args(NamedTuple):
    """ids [T]; values [V, K padded], scales [V, K/32] as float16 bits; unit 2^(112 + the tensor's); out [T, K]."""

    ids: I64_1
    values: I8_2
    scales: U16_2
    unit: F32
    out: F32_2


@kernel(EmbedInt8Args)
def embed_int8(args: int, part: int, parts: int) -> None:
    """out[t] = row ids[t] of values · scales · unit."""
    a = unpack(args, EmbedInt8Args)
    ids, out, unit = a.ids, a.out, a.unit
    begin, end = span(part, parts, len(ids))
    for t in range(begin, end):
        row, scale = a.values[ids[t]], a.scales[ids[t]]
        for d in range(out.shape[1]):
            out[t, d] = np.float32(row[d]) * (float_of(np.int32(scale[d // GROUP]) << np.int32(13)) * unit)


class EmbedFloatsArgs(NamedTuple):
    """ids [T]; a table [V, K] of 16 or of 32 bits a number, whichever is there; out [T, K]."""

    ids: I64_1
    half: U16_2
    whole: U32_2
    dtype: Int
    out: F32_2


@kernel(EmbedFloatsArgs)
def embed_floats(args: int, part: int, parts: int) -> None:
    """out[t] = row ids[t] of a table of FLOAT_DTYPES[dtype]."""
    a = unpack(args, EmbedFloatsArgs)
    begin, end = span(part, parts, len(a.ids))
    for t in range(begin, end):
        if a.dtype == 0:
            widen(a.whole[a.ids[t]], a.dtype, a.out[t])
        else:
            widen(a.half[a.ids[t]], a.dtype, a.out[t])


@function()
def widen(bits, kind, out):
    """out [n] float32 from the bits of FLOAT_DTYPES[kind]."""
    n = len(out)
    if kind == 0:
        for i in range(n):
            out[i] = float_of(np.int32(bits[i]))
    elif kind == 1:
        for i in range(n):
            out[i] = float_of(np.int32(np.uint32(bits[i]) << np.uint32(16)))
    else:
        for i in range(n):
            h = np.uint32(bits[i])
            wide = (h & np.uint32(0x8000)) << np.uint32(16) | (h & np.uint32(0x7FFF)) << np.uint32(13)
            out[i] = float_of(np.int32(wide)) * np.float32(2.0**112)


@function()
def mean_of(x):
    total = np.float32(0)
    for d in range(len(x)):
        total += x[d]
    return total / np.float32(len(x))


@function()
def squares_about(x, mean):
    """Σ (x − mean)²."""
    total = np.float32(0)
    for d in range(len(x)):
        total += (x[d] - mean) * (x[d] - mean)
    return total


@function(FIXED_ORDER)
def _scale(x, moments, weight, bias, out):
    """out = (x − mean) · scale · weight + bias, with moments (mean, scale), in one order.

    LLVM has two loops for it, and where the arrays lie decides between them.
    """
    mean, scale = moments
    for d in range(len(x)):
        out[d] = (x[d] - mean) * scale * weight[d] + bias[d]


@function()
def normalize(x, weight, bias, eps, out):
    """out = (x − mean) / √(var + eps) · weight + bias, all [n]; out may be x."""
    mean = mean_of(x)
    scale = np.float32(1) / np.sqrt(squares_about(x, mean) / np.float32(len(x)) + eps)
    _scale(x, (mean, scale), weight, bias, out)


class LayerNormArgs(NamedTuple):
    """x, out [T, D]; weight, bias [D]."""

    x: F32_2
    weight: F32_1
    bias: F32_1
    eps: F32
    out: F32_2


@kernel(LayerNormArgs)
def layer_norm(args: int, part: int, parts: int) -> None:
    """out[t] = (x[t] − mean) / √(var + eps) · weight + bias."""
    a = unpack(args, LayerNormArgs)
    begin, end = span(part, parts, len(a.x))
    for t in range(begin, end):
        normalize(a.x[t], a.weight, a.bias, a.eps, a.out[t])


class RoundToArgs(NamedTuple):
    """x [T, D]; the place of BF16 or F16 in FLOAT_DTYPES."""

    x: F32_2
    dtype: Int


@kernel(RoundToArgs, FIXED_ORDER)
def round_to(args: int, part: int, parts: int) -> None:
    """x becomes the nearest number of FLOAT_DTYPES[dtype], ties to even."""
    a = unpack(args, RoundToArgs)
    x, kind = a.x, a.dtype
    begin, end = span(part, parts, len(x))
    for t in range(begin, end):
        for d in range(x.shape[1]):
            b = np.uint32(bits_of(x[t, d]))
            size = b & np.uint32(0x7FFFFFFF)
            if size >= np.uint32(0x7F800000):  # infinity and NaN stay
                continue
            if kind == 1:
                b = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
            elif size >= np.uint32(0x38800000):  # normal float16: 10 bits of mantissa, up to 65504
                b = (b + np.uint32(0xFFF) + ((b >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
                if (b & np.uint32(0x7FFFFFFF)) >= np.uint32(0x47800000):
                    b = (b & np.uint32(0x80000000)) | np.uint32(0x7F800000)
            else:  # below, multiples of 2^-24
                magnitude = float_of(np.int32(size))
                least = (magnitude + np.float32(0.75)) - np.float32(0.75)  # 0.75's last bit is 2^-24
                b = (b & np.uint32(0x80000000)) | np.uint32(bits_of(least))
            x[t, d] = float_of(np.int32(b))


class TakeArgs(NamedTuple):
    """x [T, D], rows [E], out [E, D]."""

    x: F32_2
    rows: I64_1
    out: F32_2


@kernel(TakeArgs)
def take(args: int, part: int, parts: int) -> None:
    """out[i] = x[rows[i]]."""
    a = unpack(args, TakeArgs)
    begin, end = span(part, parts, len(a.rows))
    for i in range(begin, end):
        row, out = a.x[a.rows[i]], a.out[i]
        for d in range(len(out)):
            out[d] = row[d]


class TakeColumnsArgs(NamedTuple):
    """x [T, D], out [T, columns]; columns `first` and on."""

    x: F32_2
    first: Int
    out: F32_2


@kernel(TakeColumnsArgs)
def take_columns(args: int, part: int, parts: int) -> None:
    """out[t] = x[t, first : first + columns]."""
    a = unpack(args, TakeColumnsArgs)
    begin, end = span(part, parts, len(a.out))
    for t in range(begin, end):
        from_, to = a.x[t, a.first :], a.out[t]
        for d in range(len(to)):
            to[d] = from_[d]


class ShiftArgs(NamedTuple):
    """x, delta [T, D]; starts [B + 1]; last [B, D]; kept [T, L, D] from this layer on, or none."""

    x: F32_2
    starts: I64_1
    last: F32_2
    delta: F32_2
    kept: F32_3


@kernel(ShiftArgs)
def shift(args: int, part: int, parts: int) -> None:
    """delta[t] = x[t − 1] − x[t]. Before sequence b's first row stands last[b], which then becomes its last row.

    kept[t] gets x[t], but for a sequence's last row. A part is a range of columns, so that nobody reads a last row that
    another has set.
    """
    a = unpack(args, ShiftArgs)
    x, last, delta = a.x, a.last, a.delta
    begin, end = span(part, parts, x.shape[1])
    for b in range(len(last)):
        before = last[b, begin:end]
        for t in range(a.starts[b], a.starts[b + 1]):
            here, out = x[t, begin:end], delta[t, begin:end]
            for d in range(end - begin):
                out[d] = before[d] - here[d]
            if len(a.kept) and t + 1 < a.starts[b + 1]:
                kept = a.kept[t, 0, begin:end]
                for d in range(end - begin):
                    kept[d] = here[d]
            before = here
        for d in range(end - begin):
            last[b, begin + d] = before[d]


class LerpArgs(NamedTuple):
    """x, delta, out [T, D]; mix [1, D] if it is shared by all rows, else [T, D]."""

    x: F32_2
    delta: F32_2
    mix: F32_2
    shared: Int
    out: F32_2


@kernel(LerpArgs)
def lerp(args: int, part: int, parts: int) -> None:
    """out = x + delta · mix; with `shared`, row 0 of mix serves all."""
    a = unpack(args, LerpArgs)
    begin, end = span(part, parts, len(a.x))
    for t in range(begin, end):
        xt, dt, mt, ot = a.x[t], a.delta[t], a.mix[0 if a.shared else t], a.out[t]
        for d in range(len(xt)):
            ot[d] = xt[d] + dt[d] * mt[d]


class FinishArgs(NamedTuple):
    """y [T, N or more]; bias [1, N] or none; out [T, N]."""

    y: F32_2
    bias: F32_2
    activation: Int
    add: Int
    out: F32_2


@kernel(FinishArgs)
def finish(args: int, part: int, parts: int) -> None:
    """out = activation(y + bias), or out += y with `add`."""
    a = unpack(args, FinishArgs)
    out, bias = a.out, a.bias
    begin, end = span(part, parts, len(a.y))
    for t in range(begin, end):
        ot, yt = out[t], a.y[t, : out.shape[1]]
        if a.add:
            for d in range(len(ot)):
                ot[d] += yt[d]
            continue
        for d in range(len(ot)):
            ot[d] = yt[d]
        if len(bias):
            for d in range(len(ot)):
                ot[d] += bias[0, d]
        activate(ot, a.activation)
