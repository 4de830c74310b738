"""Norms, shifts, mixes and activations on the GPU: float32 [T, D], a row a token. Addresses and sizes as arguments."""

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import (
    bf16,
    bits,
    block_sum,
    cuda,
    exp,
    f16,
    f32,
    float_of,
    function,
    i8,
    i64,
    kernel,
    put_f32,
    sqrt,
    tanh,
    through_half,
    types,
)  # fmt: skip

NORM_THREADS = 512
"""Of a block that has a row to sum; at most, and a multiple of 32."""
THREADS = 256
"""Of a block of any other kernel here."""
ACTIVATIONS = ("", "sigmoid", "silu", "tanh", "relu_squared", "decay", "soft_decay")
"""`backend.Activation` by number."""
FLOATS = ("F32", "BF16", "F16")
"""Stored float types by number."""

_SCRATCH = NORM_THREADS + 32
_ONE = np.float32(1)
_SOFT = np.float32(-0.606530659712633)  # −e^{−1/2}


@function
def activate(x, kind):  # type: ignore[no-untyped-def]
    """ACTIVATIONS[kind] of x; NaN stays NaN."""
    if kind == 1:
        return _ONE / (_ONE + exp(-x))
    if kind == 2:
        return x / (_ONE + exp(-x))
    if kind == 3:
        return tanh(x)
    if kind == 4:
        return np.float32(0) if x <= np.float32(0) else x * x
    if kind == 5:
        return exp(-exp(x))
    if kind == 6:
        return exp(_SOFT / (_ONE + exp(-x)))
    return x


@function
def stored_float(address, kind):  # type: ignore[no-untyped-def]
    """The float that FLOATS[kind] has at `address`."""
    if kind == 0:
        return f32(address)
    if kind == 1:
        return bf16(address)
    return f16(address)


@function
def _statistics(x, D, eps, scratch):  # type: ignore[no-untyped-def]
    """Mean and 1 / √(variance + eps) of D floats at address x."""
    total = np.float32(0)
    for d in range(cuda.threadIdx.x, D, cuda.blockDim.x):
        total += f32(x + 4 * d)
    mean = block_sum(total, scratch) / np.float32(D)
    square = np.float32(0)
    for d in range(cuda.threadIdx.x, D, cuda.blockDim.x):
        off = f32(x + 4 * d) - mean
        square += off * off
    return mean, _ONE / sqrt(block_sum(square, scratch) / np.float32(D) + eps)


@function
def _normed(x, mean, scale, weight, bias, d):  # type: ignore[no-untyped-def]
    """Element d of a normed row at address x."""
    return (f32(x + 4 * d) - mean) * scale * f32(weight + 4 * d) + f32(bias + 4 * d)


@kernel("iiiifi", NORM_THREADS)
def layer_norm(x, weight, bias, out, eps, D):  # type: ignore[no-untyped-def]
    """out[t] = (x[t] − mean) / √(var + eps) · weight + bias; a block a row."""
    scratch = cuda.shared.array(_SCRATCH, types.float32)
    row = 4 * D * cuda.blockIdx.x
    mean, scale = _statistics(x + row, D, eps, scratch)
    for d in range(cuda.threadIdx.x, D, cuda.blockDim.x):
        put_f32(out + row + 4 * d, _normed(x + row, mean, scale, weight, bias, d))


@kernel("iiiiiiiiifi", NORM_THREADS)
def norm_shift(x, weight, bias, out, delta, prior, closing, last, last_offset, eps, D):  # type: ignore[no-untyped-def]
    """`layer_norm` to out, and its token shift: delta[t] = out[t − 1] − out[t]; a block a row.

    prior [T] int64 is t − 1, or −1 − b in the first row of sequence b: before that is row b of a state, whose address
    is found at `last`, `last_offset` bytes on. The first row's block, and no other, then puts the sequence's last
    normed row there, row closing[t] (int64 [T]). So no block reads what another has written.
    """
    scratch = cuda.shared.array(_SCRATCH, types.float32)
    t, first, step = np.int64(cuda.blockIdx.x), cuda.threadIdx.x, cuda.blockDim.x
    here = x + 4 * D * t
    mean, scale = _statistics(here, D, eps, scratch)
    before = i64(prior + 8 * t)
    if before >= 0:
        there = x + 4 * D * before
        mean_before, scale_before = _statistics(there, D, eps, scratch)
        for d in range(first, D, step):
            a = _normed(here, mean, scale, weight, bias, d)
            put_f32(out + 4 * (D * t + d), a)
            put_f32(delta + 4 * (D * t + d), _normed(there, mean_before, scale_before, weight, bias, d) - a)
    else:
        there = x + 4 * D * i64(closing + 8 * t)
        mean_end, scale_end = _statistics(there, D, eps, scratch)
        kept = i64(last) + last_offset - 4 * D * (before + 1)
        for d in range(first, D, step):
            a = _normed(here, mean, scale, weight, bias, d)
            put_f32(out + 4 * (D * t + d), a)
            put_f32(delta + 4 * (D * t + d), f32(kept + 4 * d) - a)
            put_f32(kept + 4 * d, _normed(there, mean_end, scale_end, weight, bias, d))


@kernel("iiiiiii", THREADS)
def shift(x, delta, prior, closing, last, last_offset, D):  # type: ignore[no-untyped-def]
    """The token shift of x itself; arguments as in `norm_shift`, a block a row."""
    t = np.int64(cuda.blockIdx.x)
    before = i64(prior + 8 * t)
    for d in range(cuda.threadIdx.x, D, cuda.blockDim.x):
        a = f32(x + 4 * (D * t + d))
        if before >= 0:
            put_f32(delta + 4 * (D * t + d), f32(x + 4 * (D * before + d)) - a)
        else:
            kept = i64(last) + last_offset + 4 * (d - D * (before + 1))
            put_f32(delta + 4 * (D * t + d), f32(kept) - a)
            put_f32(kept, f32(x + 4 * (D * i64(closing + 8 * t) + d)))


@kernel("iiiiiiii", THREADS)
def lerp(x, x_stride, delta, delta_stride, mix, mix_stride, out, K):  # type: ignore[no-untyped-def]
    """out [T, K] = x + delta ∘ mix; strides in elements, that of mix 0 where one row serves all. Blocks: (K, T)."""
    k, t = np.int64(cuda.grid(1)), np.int64(cuda.blockIdx.y)
    if k < K:
        y = f32(x + 4 * (x_stride * t + k))
        y += f32(delta + 4 * (delta_stride * t + k)) * f32(mix + 4 * (mix_stride * t + k))
        put_f32(out + 4 * (K * t + k), y)


@kernel("iiii", THREADS)
def add_gated(x, y, gate, n):  # type: ignore[no-untyped-def]
    """x += y ∘ gate, n numbers."""
    at = np.int64(cuda.grid(1))
    if at < n:
        put_f32(x + 4 * at, f32(x + 4 * at) + f32(y + 4 * at) * f32(gate + 4 * at))


@kernel("iii", THREADS)
def round_to(x, kind, n):  # type: ignore[no-untyped-def]
    """n numbers to the nearest FLOATS[kind], ties to even."""
    at = np.int64(cuda.grid(1))
    if at < n:
        y = f32(x + 4 * at)
        if kind == 2:
            y = through_half(y)
        elif y == y:  # the carry would turn a NaN into infinity
            low = bits(y)
            y = float_of((low + 0x7FFF + ((low >> 16) & 1)) & 0xFFFF0000)
        put_f32(x + 4 * at, y)


@kernel("iiii", THREADS)
def take(x, rows, out, D):  # type: ignore[no-untyped-def]
    """out[i] = x[rows[i]], rows int64. Blocks: (D, rows)."""
    d, i = np.int64(cuda.grid(1)), np.int64(cuda.blockIdx.y)
    if d < D:
        put_f32(out + 4 * (D * i + d), f32(x + 4 * (D * i64(rows + 8 * i) + d)))


@kernel("iiifiii", THREADS)
def embed_int8(ids, values, scales, unit, out, D, width):  # type: ignore[no-untyped-def]
    """out[t] = row ids[t] of values int8 [V, width] · scales float16 [V, width/32] · unit. Blocks: (D, T)."""
    d, t = np.int64(cuda.grid(1)), np.int64(cuda.blockIdx.y)
    if d < D:
        row = i64(ids + 8 * t)
        scale = f16(scales + 2 * (row * (width // 32) + d // 32)) * unit
        put_f32(out + 4 * (D * t + d), np.float32(i8(values + row * width + d)) * scale)


@kernel("iiiii", THREADS)
def embed_float(ids, table, kind, out, D):  # type: ignore[no-untyped-def]
    """out[t] = row ids[t] of a table [V, D] of FLOATS[kind]. Blocks: (D, T)."""
    d, t = np.int64(cuda.grid(1)), np.int64(cuda.blockIdx.y)
    if d < D:
        size = 4 if kind == 0 else 2
        put_f32(out + 4 * (D * t + d), stored_float(table + size * (D * i64(ids + 8 * t) + d), kind))
