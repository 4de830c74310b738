"""The recurrence of RWKV-5 and 6 on the GPU. `heads` says what a block's threads have."""

import functools

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import (
    Address,
    Float,
    Int,
    Kernel,
    Slot,
    cuda,
    f32,
    four,
    i64,
    kernel,
    let_next_begin,
    put_f32,
    quad_sum,
    sqrt,
    types,
    wait_for_previous,
    warp_sums,
)
from rwkv_cli.kernels.cuda.device.heads import LANES, PAIR, ROWS, SPAN, Form, place_of, sizes_of, threads
from rwkv_cli.kernels.cuda.device.levels import TOKENS, levels_at, put_group
from rwkv_cli.numbers import GROUP


@functools.cache
def wkv6(N: int, form: Form) -> Kernel:
    """The kernel for heads of size N, in one of its forms."""
    TURNS, BLOCKS, PUTS = form
    NP, WARPS, ROUNDS, STATE, CHANNELS, TILE = sizes_of(N, TURNS)
    RAW, ALL, SIZE, NOTHING = TURNS * CHANNELS, TILE * NP, np.float32(N), np.float32(0)
    # Known when it is compiled: nothing is beyond a head of whole chunks, or of whole warps.
    WHOLE, FULL = N == NP, N % 32 == 0

    @kernel(threads(N), BLOCKS, name=f"wkv6 N={N} ×{TURNS}")
    def wkv6(
        r: Address,
        k: Address,
        v: Address,
        w: Address,
        w_stride: Int,
        u: Address,
        weight: Address,
        bias: Address,
        gate: Address,
        eps: Float,
        starts: Address,
        state: Slot,
        offset: Int,
        y: Address,
        levels: Address,
        factors: Address,
        D: Int,
    ) -> None:
        """RWKV-5 and 6 (arXiv 2404.05892, section 4.1), normed by head, ∘ gate if there is one:

            y = norm(r·S + (Σ r∘u∘k) · v) ∘ gate · S ← diag(w)·S + kᵀv

        r, k, v, gate and y are [T, D], u, weight and bias [D], w [T, D] with w_stride = D or [1, D] with 0. A state S
        is [H, N, N]. A form that can puts levels and factors of y too, if there are addresses. Blocks: (H, B).
        """
        let_next_begin()
        receptance = cuda.shared.array(ALL, types.float32, 16)
        decay = cuda.shared.array(ALL, types.float32, 16)
        key = cuda.shared.array(ALL, types.float32, 16)
        value = cuda.shared.array(ALL, types.float32, 16)
        sums = cuda.shared.array(ALL, types.float32, 16)
        bonus = cuda.shared.array(TILE, types.float32)
        S, out = cuda.local.array(STATE, types.float32), cuda.local.array(RAW, types.float32)
        raw_r, raw_k = cuda.local.array(RAW, types.float32), cuda.local.array(RAW, types.float32)
        raw_v, raw_w = cuda.local.array(RAW, types.float32), cuda.local.array(RAW, types.float32)
        gates, totals = cuda.local.array(RAW, types.float32), cuda.local.array(TURNS, types.float32)
        h, b, tid = np.int64(cuda.blockIdx.x), np.int64(cuda.blockIdx.y), np.int64(cuda.threadIdx.x)
        lane, warp = tid % 32, tid // 32
        first, column = tid % LANES * ROWS, tid // LANES * PAIR
        wait_for_previous()
        begin, end = i64(starts + 8 * b), i64(starts + 8 * b + 8)
        if begin == end:
            return
        kept = i64(state) + offset + 4 * N * N * (b * (D // N) + h) + 4 * column
        for i in range(STATE):
            row, side = place_of(i, first)
            S[i] = f32(kept + 4 * (N * row + side)) if WHOLE or (row < N and column + side < N) else NOTHING
        # Each round has a tile's tokens, and loads what the next one needs. The first one only loads.
        for start in range(begin - TILE, end, TILE):
            count = min(TILE, end - start) if start >= begin else 0
            for turn in range(TURNS):
                totals[turn] = NOTHING
                for j in range(CHANNELS):
                    i, c, token = turn * CHANNELS + j, j * 32 + lane, turn * WARPS + warp
                    at = token * NP + c
                    if token < count and (FULL or c < N):
                        receptance[at], decay[at], key[at], value[at] = raw_r[i], raw_w[i], raw_k[i], raw_v[i]
                        totals[turn] += raw_r[i] * f32(u + 4 * (h * N + c)) * raw_k[i]
                    elif token < count and c < NP:
                        receptance[at] = decay[at] = key[at] = value[at] = NOTHING
            if count > 0:
                warp_sums(totals, TURNS)
            for turn in range(TURNS):
                if turn * WARPS + warp < count and lane == 0:
                    bonus[turn * WARPS + warp] = totals[turn]
            cuda.syncthreads()
            # No load waits for another: what is beyond the end is read again, and nothing is made of it.
            for i in range(RAW):
                channel = h * N + (i % CHANNELS * 32 + lane if FULL else min(i % CHANNELS * 32 + lane, np.int64(N - 1)))
                now = start + i // CHANNELS * WARPS + warp
                t = min(now + TILE, end - 1)
                at = 4 * (D * t + channel)
                raw_r[i], raw_k[i], raw_v[i] = f32(r + at), f32(k + at), f32(v + at)
                raw_w[i], gates[i] = f32(w + 4 * (w_stride * t + channel)), np.float32(1)
            if gate != 0:
                for i in range(RAW):
                    channel = h * N + (
                        i % CHANNELS * 32 + lane if FULL else min(i % CHANNELS * 32 + lane, np.int64(N - 1))
                    )
                    now = start + i // CHANNELS * WARPS + warp
                    gates[i] = f32(gate + 4 * (D * min(max(now, begin), end - 1) + channel))
            for step in range(count):
                begun = step * NP
                v0, v1 = value[begun + column], value[begun + column + 1]
                y0 = y1 = NOTHING
                for n in range(ROUNDS):
                    chunk = begun + n * SPAN + first
                    rs, ws, ks = four(receptance, chunk), four(decay, chunk), four(key, chunk)
                    for e in range(ROWS):
                        i = (n * ROWS + e) * PAIR
                        y0 += rs[e] * S[i]
                        y1 += rs[e] * S[i + 1]
                        S[i] = ws[e] * S[i] + ks[e] * v0
                        S[i + 1] = ws[e] * S[i + 1] + ks[e] * v1
                y0, y1 = quad_sum(y0), quad_sum(y1)
                if first == 0:
                    sums[begun + column], sums[begun + column + 1] = y0, y1
            cuda.syncthreads()
            if count > 0:
                for turn in range(TURNS):
                    totals[turn] = NOTHING
                    for j in range(CHANNELS):
                        i, c, token = turn * CHANNELS + j, j * 32 + lane, turn * WARPS + warp
                        inside = token < count and c < N
                        out[i] = sums[token * NP + c] + bonus[token] * value[token * NP + c] if inside else NOTHING
                        totals[turn] += out[i]
                warp_sums(totals, TURNS)
                for turn in range(TURNS):
                    mean, totals[turn] = totals[turn] / SIZE, NOTHING
                    for j in range(CHANNELS):
                        i = turn * CHANNELS + j
                        if FULL or j * 32 + lane < N:
                            out[i] -= mean
                            totals[turn] += out[i] * out[i]
                warp_sums(totals, TURNS)
                for turn in range(TURNS):
                    if turn * WARPS < count:
                        scale = np.float32(1) / sqrt(totals[turn] / SIZE + eps)
                        inside, t = turn * WARPS + warp < count, start + turn * WARPS + warp
                        for j in range(CHANNELS):
                            i, c = turn * CHANNELS + j, j * 32 + lane
                            channel = h * N + c
                            if inside and (FULL or c < N):
                                out[i] = out[i] * scale * f32(weight + 4 * channel) + f32(bias + 4 * channel)
                                out[i] *= gates[i]
                                put_f32(y + 4 * (D * t + channel), out[i])
                            if PUTS and levels != 0:
                                block = t // TOKENS * (D // GROUP) + h * (N // GROUP) + j
                                put_group(out[i], levels_at(levels, factors, 2, block), t % TOKENS, inside)
                cuda.syncthreads()
        for i in range(STATE):
            row, side = place_of(i, first)
            if WHOLE or (row < N and column + side < N):
                put_f32(kept + 4 * (N * row + side), S[i])

    return wkv6
