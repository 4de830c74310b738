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
    types,
    wait_for_previous,
    warp_sums,
)
from rwkv_cli.kernels.cuda.device.heads import (
    LANES,
    PAIR,
    ROWS,
    SPAN,
    Form,
    added,
    channel_of,
    norm_tokens,
    place_of,
    sizes_of,
    threads,
)
from rwkv_cli.kernels.cuda.device.levels import TOKENS, levels_at, put_group
from rwkv_cli.numbers import GROUP


@functools.cache
def wkv6(N: int, form: Form) -> Kernel:
    """The kernel for heads of size N, in one of its forms."""
    PUTS = form.puts
    TURNS, NP, WARPS, HELPERS, ROUNDS, STATE, CHANNELS, TILE, APART = sizes_of(N, form)
    RAW, ALL, PARTS, NOTHING, SHAPE = TURNS * CHANNELS, TILE * NP, LANES * APART, np.float32(0), (TURNS, CHANNELS, N)
    BOTH, ALL_PARTS = 2 * ALL, 2 * PARTS
    # Known when it is compiled: nothing is beyond a head of whole chunks, or of whole warps.
    WHOLE, FULL = N == NP, N % 32 == 0

    @kernel(threads(N, form), form.blocks, name=f"wkv6 N={N} ×{TURNS}{', split' * (HELPERS > 0)}")
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
        receptance = cuda.shared.array(BOTH, types.float32, 16)
        decay = cuda.shared.array(BOTH, types.float32, 16)
        key = cuda.shared.array(BOTH, types.float32, 16)
        value = cuda.shared.array(BOTH, types.float32, 16)
        sums = cuda.shared.array(ALL_PARTS, types.float32, 16)
        S, out = cuda.local.array(STATE, types.float32), cuda.local.array(RAW, types.float32)
        raw_r, raw_k = cuda.local.array(RAW, types.float32), cuda.local.array(RAW, types.float32)
        raw_v, raw_w = cuda.local.array(RAW, types.float32), cuda.local.array(RAW, types.float32)
        gates, totals = cuda.local.array(RAW, types.float32), cuda.local.array(TURNS, types.float32)
        # (Σ r∘u∘k) · v of the tile that is prepared, or gone through, and of the one before it
        bonus, last_bonus = cuda.local.array(RAW, types.float32), cuda.local.array(RAW, types.float32)
        of_bonus, scale = cuda.local.array(CHANNELS, types.float32), cuda.local.array(CHANNELS, types.float32)
        shift = cuda.local.array(CHANNELS, types.float32)
        h, b, tid = np.int64(cuda.blockIdx.x), np.int64(cuda.blockIdx.y), np.int64(cuda.threadIdx.x)
        lane, warp = tid % 32, tid // 32 - HELPERS
        first, column = tid % LANES * ROWS, tid // LANES * PAIR
        goes, helps = HELPERS == 0 or tid < 32 * WARPS, HELPERS == 0 or warp >= 0
        # What no other launch writes comes while the launch before ends: parameters and the state.
        for j in range(CHANNELS):
            at = 4 * channel_of(h, j, lane, N)
            of_bonus[j], scale[j], shift[j] = f32(u + at), f32(weight + at), f32(bias + at)
        begin, end = i64(starts + 8 * b), i64(starts + 8 * b + 8)
        if begin == end:
            return
        kept = i64(state) + offset + 4 * N * N * (b * (D // N) + h) + 4 * column
        if goes:
            for i in range(STATE):
                row, side = place_of(i, first)
                S[i] = f32(kept + 4 * (N * row + side)) if WHOLE or (row < N and column + side < N) else NOTHING
        wait_for_previous()
        # In a round a tile is gone through, the one before it is finished, the next one is prepared, and the one after
        # that is loaded.
        for tile in range(-2, (end - begin + TILE - 1) // TILE + 1):
            cuda.syncthreads()
            place, count = tile % 2, min(TILE, end - begin - tile * TILE) if goes and tile >= 0 else 0
            for step in range(count):
                begun = place * ALL + step * NP
                at = np.uint64(begun + column)
                v0, v1 = value[at], value[at + np.uint64(1)]
                y0 = y1 = NOTHING
                for n in range(ROUNDS):
                    chunk, part0, part1 = begun + n * SPAN + first, NOTHING, NOTHING
                    rs, ws, ks = four(receptance, chunk), four(decay, chunk), four(key, chunk)
                    for e in range(ROWS):
                        i = (n * ROWS + e) * PAIR
                        part0 += rs[e] * S[i]
                        part1 += rs[e] * S[i + 1]
                        S[i] = ws[e] * S[i] + ks[e] * v0
                        S[i + 1] = ws[e] * S[i + 1] + ks[e] * v1
                    y0, y1 = y0 + part0, y1 + part1
                at = np.uint64(place * PARTS + APART * (first // ROWS) + step * NP + column)
                sums[at], sums[at + np.uint64(1)] = y0, y1
            if helps and tile > 0:
                start = begin + (tile - 1) * TILE
                for turn in range(TURNS):
                    token, totals[turn] = turn * WARPS + warp, NOTHING
                    for j in range(CHANNELS):
                        i, at = turn * CHANNELS + j, (tile - 1) % 2 * PARTS + token * NP + j * 32 + lane
                        inside = token < min(TILE, end - start) and (FULL or j * 32 + lane < N)
                        out[i] = added(sums, at, APART) + last_bonus[i] if inside else NOTHING
                        totals[turn] += out[i]
                norm_tokens(out, totals, (scale, shift), eps, SHAPE)
                for turn in range(TURNS):
                    t = start + turn * WARPS + warp
                    inside = turn * WARPS + warp < min(TILE, end - start)
                    for j in range(CHANNELS):
                        i = turn * CHANNELS + j
                        if inside and (FULL or j * 32 + lane < N):
                            out[i] *= gates[i]
                            put_f32(y + 4 * (D * t + channel_of(h, j, lane, N)), out[i])
                        if PUTS and levels != 0:
                            block = t // TOKENS * (D // GROUP) + h * (N // GROUP) + j
                            put_group(out[i], levels_at(levels, factors, 2, block), t % TOKENS, inside)
            for i in range(RAW):
                last_bonus[i] = bonus[i]
            start = begin + (tile + 1) * TILE
            if helps and tile >= -1 and start < end:
                for turn in range(TURNS):
                    totals[turn] = NOTHING
                    for j in range(CHANNELS):
                        if FULL or j * 32 + lane < N:
                            totals[turn] += raw_r[turn * CHANNELS + j] * of_bonus[j] * raw_k[turn * CHANNELS + j]
                warp_sums(totals, TURNS)
                for turn in range(TURNS):
                    token = turn * WARPS + warp
                    for j in range(CHANNELS):
                        i, at = turn * CHANNELS + j, (tile + 1) % 2 * ALL + token * NP + j * 32 + lane
                        bonus[i] = totals[turn] * raw_v[i]
                        if token < TILE and (FULL or j * 32 + lane < N):
                            receptance[at], decay[at], key[at], value[at] = raw_r[i], raw_w[i], raw_k[i], raw_v[i]
                        elif token < TILE and j * 32 + lane < NP:
                            receptance[at] = decay[at] = key[at] = value[at] = NOTHING
            start = begin + (tile + 2) * TILE
            if helps and start < end:
                for i in range(RAW):
                    # What is beyond the end is read again, and nothing is made of it.
                    t, channel = (
                        min(start + i // CHANNELS * WARPS + warp, end - 1),
                        channel_of(h, i % CHANNELS, lane, N),
                    )
                    at = 4 * (D * t + channel)
                    raw_r[i], raw_k[i], raw_v[i] = f32(r + at), f32(k + at), f32(v + at)
                    raw_w[i] = f32(w + 4 * (w_stride * t + channel))
            start = begin + tile * TILE
            if helps and tile >= 0 and start < end:
                for i in range(RAW):
                    t = min(start + i // CHANNELS * WARPS + warp, end - 1)
                    at = 4 * (D * t + channel_of(h, i % CHANNELS, lane, N))
                    gates[i] = f32(gate + at) if gate != 0 else np.float32(1)
        if goes:
            for i in range(STATE):
                row, side = place_of(i, first)
                if WHOLE or (row < N and column + side < N):
                    put_f32(kept + 4 * (N * row + side), S[i])

    return wkv6
