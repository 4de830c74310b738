"""The recurrence of RWKV-7 on the GPU. `heads` says what a block's threads have."""

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
def wkv7(N: int, form: Form) -> Kernel:
    """The kernel for heads of size N, in one of its forms."""
    PUTS = form.puts
    TURNS, NP, WARPS, HELPERS, ROUNDS, STATE, CHANNELS, TILE, APART = sizes_of(N, form)
    RAW, ALL, PARTS, NOTHING, SHAPE = TURNS * CHANNELS, TILE * NP, LANES * APART, np.float32(0), (TURNS, CHANNELS, N)
    BOTH, ALL_PARTS, HELD, TWO = 2 * ALL, 2 * PARTS, STATE // PAIR, 2 * TURNS
    # Known when it is compiled: nothing is beyond a head of whole chunks, or of whole warps.
    WHOLE, FULL = N == NP, N % 32 == 0

    @kernel(threads(N, form), form.blocks, name=f"wkv7 N={N} ×{TURNS}{', split' * (HELPERS > 0)}")
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
        receptance = cuda.shared.array(BOTH, types.float32, 16)
        decay = cuda.shared.array(BOTH, types.float32, 16)
        key = cuda.shared.array(BOTH, types.float32, 16)
        value = cuda.shared.array(BOTH, types.float32, 16)
        kappa = cuda.shared.array(BOTH, types.float32, 16)
        removal = cuda.shared.array(BOTH, types.float32, 16)  # −κ∘a
        sums = cuda.shared.array(ALL_PARTS, types.float32, 16)
        S, removed = cuda.local.array(STATE, types.float32), cuda.local.array(HELD, types.float32)
        raw_r, raw_w = cuda.local.array(RAW, types.float32), cuda.local.array(RAW, types.float32)
        raw_k, raw_v = cuda.local.array(RAW, types.float32), cuda.local.array(RAW, types.float32)
        raw_a, gates = cuda.local.array(RAW, types.float32), cuda.local.array(RAW, types.float32)
        firsts, mixes = cuda.local.array(RAW, types.float32), cuda.local.array(RAW, types.float32)
        # Σ r∘k∘r_k · v of the tile that is prepared, or gone through, and of the one before it
        bonus, last_bonus = cuda.local.array(RAW, types.float32), cuda.local.array(RAW, types.float32)
        out, totals = cuda.local.array(RAW, types.float32), cuda.local.array(TWO, types.float32)
        of_kappa, of_key = cuda.local.array(CHANNELS, types.float32), cuda.local.array(CHANNELS, types.float32)
        of_bonus, scale = cuda.local.array(CHANNELS, types.float32), cuda.local.array(CHANNELS, types.float32)
        shift = cuda.local.array(CHANNELS, types.float32)
        h, b, tid = np.int64(cuda.blockIdx.x), np.int64(cuda.blockIdx.y), np.int64(cuda.threadIdx.x)
        lane, warp = tid % 32, tid // 32 - HELPERS
        first, column = tid % LANES * ROWS, tid // LANES * PAIR
        goes, helps = HELPERS == 0 or tid < 32 * WARPS, HELPERS == 0 or warp >= 0
        # What no other launch writes comes while the launch before ends: parameters and the state.
        for j in range(CHANNELS):
            at = 4 * channel_of(h, j, lane, N)
            of_kappa[j], of_key[j], of_bonus[j] = f32(k_k + at), f32(k_a + at), f32(r_k + at)
            scale[j], shift[j] = f32(weight + at), f32(bias + at)
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
                c0 = c1 = y0 = y1 = NOTHING
                for n in range(ROUNDS):
                    chunk, part0, part1 = begun + n * SPAN + first, NOTHING, NOTHING
                    ds, ws, ks, bs = four(kappa, chunk), four(decay, chunk), four(key, chunk), four(removal, chunk)
                    for e in range(ROWS):
                        i = (n * ROWS + e) * PAIR
                        part0 += ds[e] * S[i]
                        part1 += ds[e] * S[i + 1]
                        S[i] = ws[e] * S[i] + ks[e] * v0
                        S[i + 1] = ws[e] * S[i + 1] + ks[e] * v1
                        removed[n * ROWS + e] = bs[e]
                    c0, c1 = c0 + part0, c1 + part1
                c0, c1 = quad_sum(c0), quad_sum(c1)
                for n in range(ROUNDS):
                    rs, part0, part1 = four(receptance, begun + n * SPAN + first), NOTHING, NOTHING
                    for e in range(ROWS):
                        i = (n * ROWS + e) * PAIR
                        S[i] += removed[n * ROWS + e] * c0
                        S[i + 1] += removed[n * ROWS + e] * c1
                        part0 += rs[e] * S[i]
                        part1 += rs[e] * S[i + 1]
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
                        out[i] = added(sums, at, APART) if inside else NOTHING
                        totals[turn] += out[i]
                norm_tokens(out, totals, (scale, shift), eps, SHAPE)
                for turn in range(TURNS):
                    t = start + turn * WARPS + warp
                    inside = turn * WARPS + warp < min(TILE, end - start)
                    for j in range(CHANNELS):
                        i = turn * CHANNELS + j
                        if inside and (FULL or j * 32 + lane < N):
                            out[i] = (out[i] + last_bonus[i]) * gates[i]
                            put_f32(y + 4 * (D * t + channel_of(h, j, lane, N)), out[i])
                        if PUTS and levels != 0:
                            block = t // TOKENS * (D // GROUP) + h * (N // GROUP) + j
                            put_group(out[i], levels_at(levels, factors, 2, block), t % TOKENS, inside)
            for i in range(RAW):
                last_bonus[i] = bonus[i]
            start = begin + (tile + 1) * TILE
            if helps and tile >= -1 and start < end:
                for turn in range(TURNS):
                    totals[turn] = totals[TURNS + turn] = NOTHING
                    for j in range(CHANNELS):
                        i = turn * CHANNELS + j
                        out[i] = raw_k[i] * of_kappa[j]
                        raw_k[i] *= np.float32(1) + (raw_a[i] - np.float32(1)) * of_key[j]
                        if v_first != 0:
                            raw_v[i] += (firsts[i] - raw_v[i]) * mixes[i]
                        if FULL or j * 32 + lane < N:
                            totals[turn] += out[i] * out[i]
                            totals[TURNS + turn] += raw_r[i] * raw_k[i] * of_bonus[j]
                warp_sums(totals, TWO)
                for turn in range(TURNS):
                    token, inverse = turn * WARPS + warp, np.float32(1) / max(sqrt(totals[turn]), np.float32(1e-12))
                    for j in range(CHANNELS):
                        i, at = turn * CHANNELS + j, (tile + 1) % 2 * ALL + token * NP + j * 32 + lane
                        bonus[i] = totals[TURNS + turn] * raw_v[i]
                        if token < TILE and (FULL or j * 32 + lane < N):
                            receptance[at], decay[at], key[at], value[at] = raw_r[i], raw_w[i], raw_k[i], raw_v[i]
                            kappa[at], removal[at] = out[i] * inverse, -(out[i] * inverse * raw_a[i])
                        elif token < TILE and j * 32 + lane < NP:
                            receptance[at] = decay[at] = key[at] = value[at] = NOTHING
                            kappa[at] = removal[at] = NOTHING
            start = begin + (tile + 2) * TILE
            if helps and start < end:
                for i in range(RAW):
                    # What is beyond the end is read again, and nothing is made of it.
                    t = min(start + i // CHANNELS * WARPS + warp, end - 1)
                    at = 4 * (D * t + channel_of(h, i % CHANNELS, lane, N))
                    raw_r[i], raw_w[i], raw_k[i] = f32(r + at), f32(w + at), f32(k + at)
                    raw_v[i], raw_a[i] = f32(v + at), f32(a + at)
                    if v_first != 0:
                        firsts[i], mixes[i] = f32(v_first + at), f32(v_gate + at)
            start = begin + tile * TILE
            if helps and tile >= 0 and start < end:
                for i in range(RAW):
                    t = min(start + i // CHANNELS * WARPS + warp, end - 1)
                    gates[i] = f32(g + 4 * (D * t + channel_of(h, i % CHANNELS, lane, N)))
        if goes:
            for i in range(STATE):
                row, side = place_of(i, first)
                if WHOLE or (row < N and column + side < N):
                    put_f32(kept + 4 * (N * row + side), S[i])

    return wkv7
