"""The recurrence of RWKV-7 on the GPU. `heads` says what a block's threads have."""

import functools
from typing import Any

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
    function,
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
def wkv7(N: int, form: Form) -> Kernel:
    """The kernel for heads of size N, in one of its forms."""
    TURNS, BLOCKS, PUTS = form
    NP, WARPS, ROUNDS, STATE, CHANNELS, TILE = sizes_of(N, TURNS)
    RAW, ALL, SIZE, NOTHING = TURNS * CHANNELS, TILE * NP, np.float32(N), np.float32(0)
    APART, PARTS = ALL + 8, LANES * (ALL + 8)

    @function
    def added(sums: Any, at: Int) -> Any:
        return (sums[np.uint64(at)] + sums[np.uint64(at + APART)]) + (
            sums[np.uint64(at + 2 * APART)] + sums[np.uint64(at + 3 * APART)]
        )

    # Known when it is compiled: nothing is beyond a head of whole chunks, or of whole warps.
    WHOLE, FULL = N == NP, N % 32 == 0

    @kernel(threads(N), BLOCKS, name=f"wkv7 N={N} ×{TURNS}")
    def wkv7(
        r: Address,
        w: Address,
        k: Address,
        v: Address,
        a: Address,
        g: Address,
        v_first: Address,
        v_gate: Address,
        k_k: Address,
        k_a: Address,
        r_k: Address,
        weight: Address,
        bias: Address,
        eps: Float,
        starts: Address,
        state: Slot,
        offset: Int,
        y: Address,
        levels: Address,
        factors: Address,
        D: Int,
    ) -> None:
        """RWKV-7 (arXiv 2503.14456, section 4), as `program.Wkv7` says:

            S ← diag(w)·S − (κ∘a)ᵀ·(κ·S) + kᵀv · y = (norm(r·S) + (Σ r∘k∘r_k) · v) ∘ g

        r, w, k, v, a, g, v_first, v_gate and y are [T, D], k_k, k_a, r_k, weight and bias [D]. A state S is [H, N, N].
        There is no value residual if v_first is 0. Levels and factors are those of `wkv6`. Blocks: (H, B).
        """
        let_next_begin()
        receptance = cuda.shared.array(ALL, types.float32, 16)
        decay = cuda.shared.array(ALL, types.float32, 16)
        key = cuda.shared.array(ALL, types.float32, 16)
        value = cuda.shared.array(ALL, types.float32, 16)
        kappa = cuda.shared.array(ALL, types.float32, 16)
        removal = cuda.shared.array(ALL, types.float32, 16)  # −κ∘a
        sums = cuda.shared.array(PARTS, types.float32, 16)
        bonus = cuda.shared.array(TILE, types.float32)
        S, out = cuda.local.array(STATE, types.float32), cuda.local.array(RAW, types.float32)
        raw_r, raw_w = cuda.local.array(RAW, types.float32), cuda.local.array(RAW, types.float32)
        raw_k, raw_v = cuda.local.array(RAW, types.float32), cuda.local.array(RAW, types.float32)
        raw_a, gates = cuda.local.array(RAW, types.float32), cuda.local.array(RAW, types.float32)
        firsts, mixes = cuda.local.array(RAW, types.float32), cuda.local.array(RAW, types.float32)
        squares, totals = cuda.local.array(TURNS, types.float32), cuda.local.array(TURNS, types.float32)
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
        for i in range(RAW):
            firsts[i] = mixes[i] = NOTHING
        # Each round has a tile's tokens, and loads what the next one needs. The first one only loads.
        for start in range(begin - TILE, end, TILE):
            count = min(TILE, end - start) if start >= begin else 0
            if count > 0:
                for turn in range(TURNS):
                    squares[turn] = totals[turn] = NOTHING
                    for j in range(CHANNELS):
                        i, c = turn * CHANNELS + j, j * 32 + lane
                        out[i] = NOTHING
                        if FULL or c < N:
                            channel = 4 * (h * N + c)
                            out[i] = raw_k[i] * f32(k_k + channel)
                            raw_k[i] *= np.float32(1) + (raw_a[i] - np.float32(1)) * f32(k_a + channel)
                            squares[turn] += out[i] * out[i]
                            totals[turn] += raw_r[i] * raw_k[i] * f32(r_k + channel)
                warp_sums(squares, TURNS)
                warp_sums(totals, TURNS)
            for turn in range(TURNS):
                token = turn * WARPS + warp
                if token < count:
                    inverse = np.float32(1) / max(sqrt(squares[turn]), np.float32(1e-12))
                    if lane == 0:
                        bonus[token] = totals[turn]
                    for j in range(CHANNELS):
                        i, at = turn * CHANNELS + j, token * NP + j * 32 + lane
                        if FULL or j * 32 + lane < N:
                            receptance[at], decay[at], key[at], value[at] = raw_r[i], raw_w[i], raw_k[i], raw_v[i]
                            kappa[at], removal[at] = out[i] * inverse, -(out[i] * inverse * raw_a[i])
                            if v_first != 0:
                                value[at] += (firsts[i] - raw_v[i]) * mixes[i]
                        elif j * 32 + lane < NP:
                            receptance[at] = decay[at] = key[at] = value[at] = kappa[at] = removal[at] = NOTHING
            cuda.syncthreads()
            # No load waits for another: what is beyond the end is read again, and nothing is made of it.
            for i in range(RAW):
                channel = h * N + (i % CHANNELS * 32 + lane if FULL else min(i % CHANNELS * 32 + lane, np.int64(N - 1)))
                now = start + i // CHANNELS * WARPS + warp
                at = 4 * (D * min(now + TILE, end - 1) + channel)
                raw_r[i], raw_w[i], raw_k[i] = f32(r + at), f32(w + at), f32(k + at)
                raw_v[i], raw_a[i] = f32(v + at), f32(a + at)
                gates[i] = f32(g + 4 * (D * min(max(now, begin), end - 1) + channel))
            if v_first != 0:
                for i in range(RAW):
                    channel = h * N + (
                        i % CHANNELS * 32 + lane if FULL else min(i % CHANNELS * 32 + lane, np.int64(N - 1))
                    )
                    at = 4 * (D * min(start + i // CHANNELS * WARPS + warp + TILE, end - 1) + channel)
                    firsts[i], mixes[i] = f32(v_first + at), f32(v_gate + at)
            for step in range(count):
                begun = step * NP
                at = np.uint64(begun + column)
                v0, v1 = value[at], value[at + np.uint64(1)]
                c0 = c1 = y0 = y1 = NOTHING
                for n in range(ROUNDS):
                    ds, part0, part1 = four(kappa, begun + n * SPAN + first), NOTHING, NOTHING
                    for e in range(ROWS):
                        i = (n * ROWS + e) * PAIR
                        part0 += ds[e] * S[i]
                        part1 += ds[e] * S[i + 1]
                    c0, c1 = c0 + part0, c1 + part1
                c0, c1 = quad_sum(c0), quad_sum(c1)
                for n in range(ROUNDS):
                    chunk, part0, part1 = begun + n * SPAN + first, NOTHING, NOTHING
                    rs, ws, ks, bs = (
                        four(receptance, chunk), four(decay, chunk), four(key, chunk), four(removal, chunk),
                    )  # fmt: skip
                    for e in range(ROWS):
                        i = (n * ROWS + e) * PAIR
                        S[i] = ws[e] * S[i] + ks[e] * v0 + bs[e] * c0
                        S[i + 1] = ws[e] * S[i + 1] + ks[e] * v1 + bs[e] * c1
                        part0 += rs[e] * S[i]
                        part1 += rs[e] * S[i + 1]
                    y0, y1 = y0 + part0, y1 + part1
                at += np.uint64(APART * (first // ROWS))
                sums[at], sums[at + np.uint64(1)] = y0, y1
            cuda.syncthreads()
            if count > 0:
                for turn in range(TURNS):
                    totals[turn] = NOTHING
                    for j in range(CHANNELS):
                        i, c, token = turn * CHANNELS + j, j * 32 + lane, turn * WARPS + warp
                        out[i] = added(sums, token * NP + c) if token < count and (FULL or c < N) else NOTHING
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
                        token = turn * WARPS + warp
                        inside, t = token < count, start + token
                        for j in range(CHANNELS):
                            i, c = turn * CHANNELS + j, j * 32 + lane
                            channel = h * N + c
                            if inside and (FULL or c < N):
                                out[i] = out[i] * scale * f32(weight + 4 * channel) + f32(bias + 4 * channel)
                                out[i] = (out[i] + bonus[token] * value[token * NP + c]) * gates[i]
                                put_f32(y + 4 * (D * t + channel), out[i])
                            if PUTS and levels != 0:
                                block = t // TOKENS * (D // GROUP) + h * (N // GROUP) + j
                                put_group(out[i], levels_at(levels, factors, 2, block), t % TOKENS, inside)
                cuda.syncthreads()
        for i in range(STATE):
            row, side = place_of(i, first)
            if WHOLE or (row < N and column + side < N):
                put_f32(kept + 4 * (N * row + side), S[i])

    return wkv7
