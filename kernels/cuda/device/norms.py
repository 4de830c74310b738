"""Norms and token shifts on the GPU, for float32 matrices [T, D] with a row a token.

A block has a row, whose numbers its threads keep in registers. T is how many blocks there are in one direction.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import (
    MOST_WARPS,
    Address,
    Float,
    Int,
    Kernel,
    Slot,
    cuda,
    f32,
    function,
    i64,
    kernel,
    let_next_begin,
    put_f32,
    sqrt,
    types,
    wait_for_previous,
    warp_sums,
)
from rwkv_cli.kernels.cuda.device.levels import TOKENS, levels_at, put_group
from rwkv_cli.numbers import GROUP

THREADS = 256
"""Most threads of a block of `shift`."""
_MOST_THREADS = 512
"""Threads of a block that norms a row. More would leave too few registers for what each keeps of a wide row."""
SPREAD_ROWS = 16
"""Rows whose work `norm_shift` spreads over several blocks each. More fill the GPU by themselves."""
_ONE = np.float32(1)


class MixRow(NamedTuple):
    """A row of the table of `norm_shift`: a mix that is rounded to levels."""

    mix: Address
    """float32 [D]; 0 for no delta at all."""
    levels: Address
    factors: Address
    planes: Int


MIX = MixRow(*range(0, 8 * len(MixRow._fields), 8))
"""The offset of each column in a row, in bytes."""
_MIX_ROW_BYTES = 8 * len(MIX)


def norm_threads(D: int) -> int:
    """Threads of a block that norms a row of D columns: whole warps, one column each as far as that goes."""
    return min(_MOST_THREADS, -(-D // 32) * 32)


@function
def _two_sums(pair: Any, scratch: Any) -> None:
    """The sums of both numbers of a pair over a block, in every thread's pair.

    `scratch`, in shared memory, is for this call alone.
    """
    lane, warp, warps = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32, cuda.blockDim.x // 32
    warp_sums(pair, 2)
    if lane == 0:
        scratch[0, warp], scratch[1, warp] = pair[0], pair[1]
    cuda.syncthreads()
    pair[0] = scratch[0, lane] if lane < warps else np.float32(0)
    pair[1] = scratch[1, lane] if lane < warps else np.float32(0)
    warp_sums(pair, 2)


@functools.cache
def layer_norm(D: int) -> Kernel:
    """The kernel for rows of D columns."""
    THREADS, COUNT, SCRATCH = norm_threads(D), -(-D // norm_threads(D)), (2, MOST_WARPS)

    @kernel(THREADS, name=f"layer_norm ×{COUNT}")
    def layer_norm(x: Address, weight: Address, bias: Address, out: Address, eps: Float, D: Int) -> None:
        """out[t] = (x[t] − mean) / √(variance + eps) · weight + bias.

        x and out are [T, D], weight and bias [D]. Blocks: (T), each for a row, which its threads keep in registers.
        """
        let_next_begin()
        sums = cuda.shared.array(SCRATCH, types.float32)
        squares = cuda.shared.array(SCRATCH, types.float32)
        own, weights = cuda.local.array(COUNT, types.float32), cuda.local.array(COUNT, types.float32)
        biases, pair = cuda.local.array(COUNT, types.float32), cuda.local.array(2, types.float32)
        row, tid = 4 * D * np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x)
        for i in range(COUNT):
            d = tid + THREADS * i
            weights[i] = f32(weight + 4 * d) if d < D else np.float32(0)
            biases[i] = f32(bias + 4 * d) if d < D else np.float32(0)
        wait_for_previous()
        pair[0] = pair[1] = np.float32(0)
        for i in range(COUNT):
            d = tid + THREADS * i
            own[i] = f32(x + row + 4 * d) if d < D else np.float32(0)
            pair[0] += own[i]
        _two_sums(pair, sums)
        mean, pair[0] = pair[0] / np.float32(D), np.float32(0)
        for i in range(COUNT):
            if tid + THREADS * i < D:
                own[i] -= mean
                pair[0] += own[i] * own[i]
        _two_sums(pair, squares)
        scale = _ONE / sqrt(pair[0] / np.float32(D) + eps)
        for i in range(COUNT):
            d = tid + THREADS * i
            if d < D:
                put_f32(out + row + 4 * d, own[i] * scale * weights[i] + biases[i])

    return layer_norm


@function
def _sequence_of(t: Int, starts: Address, B: Int, found: Any) -> Any:
    """The sequence that has row t, in every thread: b with starts[b] ≤ t < starts[b + 1]. `found` is shared."""
    if B == 1:
        return np.int64(0)
    for b in range(cuda.threadIdx.x, B, cuda.blockDim.x):
        if i64(starts + 8 * b) <= t and t < i64(starts + 8 * b + 8):
            found[0] = b
    cuda.syncthreads()
    return found[0]


@functools.cache
def norm_shift(D: int, spread: bool, mixes: int) -> Kernel:
    """The kernel for rows of D columns, whose work is spread over several blocks a row or left to one.

    Few rows are spread. Each of a row's blocks works out its mean and variance, and then has a column a thread. Only
    such blocks round mixes to levels.
    """
    THREADS, COUNT, SCRATCH = norm_threads(D), -(-D // norm_threads(D)), (2, MOST_WARPS)
    EACH, MIXES = 1 if spread else COUNT, max(mixes, 1)

    @kernel(THREADS, name=f"norm_shift ×{COUNT}{f' spread, {mixes} mixes' * spread}")
    def norm_shift(
        x: Address,
        weight: Address,
        bias: Address,
        out: Address,
        delta: Address,
        starts: Address,
        last: Slot,
        last_offset: Int,
        table: Address,
        eps: Float,
        B: Int,
        D: Int,
    ) -> None:
        """`layer_norm` of x to out, and the token shift of out: delta[t] = out[t − 1] − out[t].

        x, out and delta are [T, D]; starts is int64 [B + 1]. The row before the first one of sequence b is row b of a
        state [B, D], which lies last_offset bytes after the address at `last`. A table of `MixRow` says which mixes
        out + delta ∘ mix are rounded to levels. Blocks: (columns, T).

        A block works out the row before its own again, so none reads what another has written. The block of a
        sequence's first row, and no other, works out the sequence's last row instead and puts it into the state.
        """
        let_next_begin()
        sums = cuda.shared.array(SCRATCH, types.float32)
        squares = cuda.shared.array(SCRATCH, types.float32)
        own, other = cuda.local.array(COUNT, types.float32), cuda.local.array(COUNT, types.float32)
        gains, offsets = cuda.local.array(EACH, types.float32), cuda.local.array(EACH, types.float32)
        difference, mix = cuda.local.array(EACH, types.float32), cuda.local.array(MIXES, types.float32)
        source, places = cuda.local.array(MIXES, types.int64), cuda.local.array(MIXES, types.int64)
        factors, planes = cuda.local.array(MIXES, types.int64), cuda.local.array(MIXES, types.int64)
        pair, found = cuda.local.array(2, types.float32), cuda.shared.array(1, types.int64)
        t, tid = np.int64(cuda.blockIdx.y), np.int64(cuda.threadIdx.x)
        first = tid + THREADS * EACH * np.int64(cuda.blockIdx.x)
        # What no launch writes comes while the launch before ends: it is seldom in the cache.
        if spread and first < D:
            gains[0], offsets[0] = f32(weight + 4 * first), f32(bias + 4 * first)
        group, groups = first // GROUP, (D + GROUP - 1) // GROUP
        for m in range(mixes):
            row, block = table + _MIX_ROW_BYTES * m, t // TOKENS * groups + group
            source[m] = i64(row + MIX.mix)
            mix[m] = f32(source[m] + 4 * first) if source[m] != 0 and first < D else np.float32(0)
            places[m], factors[m], planes[m] = levels_at(
                i64(row + MIX.levels), i64(row + MIX.factors), i64(row + MIX.planes), block
            )
        b = _sequence_of(t, starts, B, found)
        kept = i64(last) + last_offset + 4 * D * b
        begins = t == i64(starts + 8 * b)
        there = i64(starts + 8 * b + 8) - 1 if begins else t - 1
        wait_for_previous()
        pair[0] = pair[1] = np.float32(0)
        for i in range(EACH):
            d = first + THREADS * i
            difference[i] = f32(kept + 4 * d) if begins and d < D else np.float32(0)
        for i in range(COUNT):
            d = tid + THREADS * i
            own[i] = f32(x + 4 * (D * t + d)) if d < D else np.float32(0)
            other[i] = f32(x + 4 * (D * there + d)) if d < D else np.float32(0)
        for i in range(COUNT):
            pair[0] += own[i]
            pair[1] += other[i]
        _two_sums(pair, sums)
        mean, mean_other = pair[0] / np.float32(D), pair[1] / np.float32(D)
        pair[0] = pair[1] = np.float32(0)
        for i in range(COUNT):
            if tid + THREADS * i < D:
                own[i] -= mean
                other[i] -= mean_other
                pair[0] += own[i] * own[i]
                pair[1] += other[i] * other[i]
        _two_sums(pair, squares)
        scale, scale_other = _ONE / sqrt(pair[0] / np.float32(D) + eps), _ONE / sqrt(pair[1] / np.float32(D) + eps)
        if spread and first < D:
            # A thread has any column, but registers have no index. What is read again lies in the cache.
            own[0], other[0] = f32(x + 4 * (D * t + first)) - mean, f32(x + 4 * (D * there + first)) - mean_other
        # No load waits for a store.
        for i in range(EACH):
            d = first + THREADS * i
            if d < D:
                if not spread:
                    gains[i], offsets[i] = f32(weight + 4 * d), f32(bias + 4 * d)
                own[i] = own[i] * scale * gains[i] + offsets[i]
                other[i] = other[i] * scale_other * gains[i] + offsets[i]
                difference[i] = (difference[i] if begins else other[i]) - own[i]
        for i in range(EACH):
            d = first + THREADS * i
            if d < D:
                put_f32(out + 4 * (D * t + d), own[i])
                put_f32(delta + 4 * (D * t + d), difference[i])
                if begins:
                    put_f32(kept + 4 * d, other[i])
        for m in range(mixes):
            y = own[0] if first < D else np.float32(0)
            if first < D and source[m] != 0:  # a branch, so that it becomes one rounded instruction, as in `mixed`
                y += difference[0] * mix[m]
            put_group(y, (places[m], factors[m], planes[m]), t % TOKENS, group < groups)

    return norm_shift


@kernel(THREADS)
def shift(x: Address, delta: Address, starts: Address, last: Slot, last_offset: Int, B: Int, D: Int) -> None:
    """The token shift of x itself. The arguments and blocks are those of `norm_shift`."""
    let_next_begin()
    wait_for_previous()
    t = np.int64(cuda.blockIdx.x)
    b = _sequence_of(t, starts, B, cuda.shared.array(1, types.int64))
    begin, end = i64(starts + 8 * b), i64(starts + 8 * b + 8)
    for d in range(cuda.threadIdx.x, D, cuda.blockDim.x):
        at = x + 4 * (D * t + d)
        a = f32(at)
        if t > begin:
            put_f32(delta + 4 * (D * t + d), f32(at - 4 * D) - a)
        else:
            kept = i64(last) + last_offset + 4 * (D * b + d)
            put_f32(delta + 4 * (D * t + d), f32(kept) - a)
            put_f32(kept, f32(x + 4 * (D * (end - 1) + d)))
