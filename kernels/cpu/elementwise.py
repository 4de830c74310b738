"""Rows in and out of the matrix products: embedding, norms, token shift, activations. float32 [T, D], a row a token.

A loop that sums never stores floats as well. LLVM would put a test for overlapping arrays before it and a second,
scalar loop behind that, and where arrays happen to lie would decide in which order the sum is taken.
"""

import numpy as np

from rwkv_cli.kernels.cpu.args import unpack
from rwkv_cli.kernels.cpu.compile import FIXED_ORDER, function, kernel
from rwkv_cli.kernels.cpu.llvm.bits import bits_of, float_of

ACTIVATIONS = ("", "sigmoid", "silu", "tanh", "relu_squared", "decay", "soft_decay")
DTYPES = ("F32", "BF16", "F16")


@function(FIXED_ORDER)
def exp(x):  # type: ignore[no-untyped-def]
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
def span(part, parts, n):  # type: ignore[no-untyped-def]
    """The range of n things that part `part` of `parts` has."""
    return part * n // parts, (part + 1) * n // parts


@function()
def activate(x, activation):  # type: ignore[no-untyped-def]
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


EMBED_INT8 = "i64.1 i8.2 u16.2 f32 f32.2 int"


@kernel(EMBED_INT8)
def embed_int8(args, part):  # type: ignore[no-untyped-def]
    """Rows `ids` of a table: values [V, Kp], scales [V, Kp/32] as float16 bits. unit = 2^(112 + the tensor's)."""
    ids, values, scales, unit, out, parts = unpack(args, EMBED_INT8)
    begin, end = span(part, parts, len(ids))
    for t in range(begin, end):
        row, scale = values[ids[t]], scales[ids[t]]
        for d in range(out.shape[1]):
            out[t, d] = np.float32(row[d]) * (float_of(np.int32(scale[d // 32]) << np.int32(13)) * unit)


EMBED_FLOATS = "i64.1 u16.2 u32.2 int f32.2 int"


@kernel(EMBED_FLOATS)
def embed_floats(args, part):  # type: ignore[no-untyped-def]
    """Rows `ids` of a table of 16 or 32 bits a number, whichever is given; DTYPES[kind]."""
    ids, half, whole, kind, out, parts = unpack(args, EMBED_FLOATS)
    begin, end = span(part, parts, len(ids))
    for t in range(begin, end):
        if kind == 0:
            widen(whole[ids[t]], kind, out[t])
        else:
            widen(half[ids[t]], kind, out[t])


@function()
def widen(bits, kind, out):  # type: ignore[no-untyped-def]
    """out [n] float32 from the bits of DTYPES[kind]."""
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
def mean_of(x):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for d in range(len(x)):
        total += x[d]
    return total / np.float32(len(x))


@function()
def squares_about(x, mean):  # type: ignore[no-untyped-def]
    """Σ (x − mean)²."""
    total = np.float32(0)
    for d in range(len(x)):
        total += (x[d] - mean) * (x[d] - mean)
    return total


@function(FIXED_ORDER)
def _scale(x, mean, scale, weight, bias, out):  # type: ignore[no-untyped-def]
    """In one order, since LLVM has two loops for it and where the arrays lie decides between them."""
    for d in range(len(x)):
        out[d] = (x[d] - mean) * scale * weight[d] + bias[d]


@function()
def normalize(x, weight, bias, eps, out):  # type: ignore[no-untyped-def]
    """out = (x − mean) / √(var + eps) · weight + bias, all [n]; out may be x."""
    mean = mean_of(x)
    _scale(x, mean, np.float32(1) / np.sqrt(squares_about(x, mean) / np.float32(len(x)) + eps), weight, bias, out)


LAYER_NORM = "f32.2 f32.1 f32.1 f32 f32.2 int"


@kernel(LAYER_NORM)
def layer_norm(args, part):  # type: ignore[no-untyped-def]
    """Of each row."""
    x, weight, bias, eps, out, parts = unpack(args, LAYER_NORM)
    begin, end = span(part, parts, len(x))
    for t in range(begin, end):
        normalize(x[t], weight, bias, eps, out[t])


ROUND_TO = "f32.2 int int"


@kernel(ROUND_TO, FIXED_ORDER)
def round_to(args, part):  # type: ignore[no-untyped-def]
    """x to the nearest number of DTYPES[kind], 1 or 2, ties to even."""
    x, kind, parts = unpack(args, ROUND_TO)
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


TAKE = "f32.2 i64.1 f32.2"


@kernel(TAKE)
def take(args, part):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """out[i] = x[rows[i]]."""
    x, rows, out = unpack(args, TAKE)
    for i in range(len(rows)):
        out[i] = x[rows[i]]


SHIFT = "f32.2 i64.1 f32.2 f32.2 int"


@kernel(SHIFT)
def shift(args, part):  # type: ignore[no-untyped-def]
    """delta[t] = x[t−1] − x[t]. Before sequence b's first row is last[b], which then becomes its last row.

    starts [B + 1], last [B, D]. A part is a range of columns, so that nobody reads a last row that another has set.
    """
    x, starts, last, delta, parts = unpack(args, SHIFT)
    begin, end = span(part, parts, x.shape[1])
    for b in range(len(last)):
        before = last[b, begin:end]
        for t in range(starts[b], starts[b + 1]):
            here, out = x[t, begin:end], delta[t, begin:end]
            for d in range(end - begin):
                out[d] = before[d] - here[d]
            before = here
        for d in range(end - begin):
            last[b, begin + d] = before[d]


LERP = "f32.2 f32.2 f32.2 f32.2 int"


@kernel(LERP)
def lerp(args, part):  # type: ignore[no-untyped-def]
    """out = x + delta · mix; mix is [1, D] or [T, D]."""
    x, delta, mix, out, parts = unpack(args, LERP)
    begin, end = span(part, parts, len(x))
    for t in range(begin, end):
        xt, dt, mt, ot = x[t], delta[t], mix[t if len(mix) > 1 else 0], out[t]
        for d in range(len(xt)):
            ot[d] = xt[d] + dt[d] * mt[d]


ADD_GATED = "f32.2 f32.2 f32.2 int"


@kernel(ADD_GATED)
def add_gated(args, part):  # type: ignore[no-untyped-def]
    """x += y · gate."""
    x, y, gate, parts = unpack(args, ADD_GATED)
    begin, end = span(part, parts, len(x))
    for t in range(begin, end):
        xt, yt, gt = x[t], y[t], gate[t]
        for d in range(len(xt)):
            xt[d] += yt[d] * gt[d]


FINISH = "f32.2 f32.2 int int f32.2 int"


@kernel(FINISH)
def finish(args, part):  # type: ignore[no-untyped-def]
    """out [T, N] = activation(y + bias), or out += y if `onto`; y [T, N or more], bias [1, N] or none."""
    y, bias, activation, onto, out, parts = unpack(args, FINISH)
    begin, end = span(part, parts, len(y))
    for t in range(begin, end):
        ot, yt = out[t], y[t, : out.shape[1]]
        if onto:
            for d in range(len(ot)):
                ot[d] += yt[d]
            continue
        for d in range(len(ot)):
            ot[d] = yt[d]
        if len(bias):
            for d in range(len(ot)):
                ot[d] += bias[0, d]
        activate(ot, activation)
