"""The inner step of the int8 matmul: groups of 32 columns, some strips of 16 rows, some tokens.

    y[t, s·16 + i] += (Σ_c w[s, c, i] · a[t, c]) · (scale[s, i] · unit) · factor[t]      i < 16, c < 32

The sum is exact in int32; the rest is float32. Weights lie in tiles of 16 rows × 4 columns, so that one instruction
multiplies a tile with 4 activations and adds each row's 4 products into its own lane. No sum crosses lanes.

Activations are integers of 8 or of 15 bits, rounded in the same groups of 32. Two forms of the same sum:

- AVX-512 VNNI: `vpdpbusd` multiplies unsigned by signed bytes, so a weight w enters as w + 128 (one xor). An activation
  of 15 bits is two signed planes, a = 256·high + low: of a group, 32 bytes of one and then 32 of the other. One of 8
  bits is a plane. `offset[t]` = −128 · Σ_c a[t, c] takes the 128 back out.
- Portable: both are widened to 16 bits, multiplied and added in pairs (`pmaddwd` on x86; LLVM finds `smlal` on Arm). Of
  each four weights, the first and the third become one pair, since shifts within 16 bits widen them so. Activations
  are stored in that order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from rwkv_cli.kernels.cpu.llvm.emitter import F32, I8, I16, I32, I64, Emitter, vector
from rwkv_cli.numbers import GROUP

STRIP = 16
"""Outputs that one strip of tiles holds."""
TILES = 8
"""Tiles of 4 columns in a group of 32."""
TILE_BYTES = 64
PLANES = {8: 1, 15: 2}
"""Signed bytes of an activation, by its bits."""


class WeightGroup(NamedTuple):
    """The place of a group of 32 columns of some strips: int64 addresses, and byte strides from strip to strip."""

    tiles: int
    tile_stride: int
    scales: int
    """float16 bits, or float32."""
    scale_stride: int
    unit: float
    """2**112 of the tensor's unit, since float16 bits shifted into a float32 stand for 2**-112 of their value. float32
    scales do without."""


class LevelGroup(NamedTuple):
    """The place of a group of 32 activations of some tokens: int64 addresses, and byte strides from token to token."""

    levels: int
    level_stride: int
    factors: int
    """float32."""
    offsets: int
    """int32."""
    stride: int
    """The stride of factors and offsets."""


def _sums_vnni(
    e: Emitter, w: WeightGroup, strips: int, a: LevelGroup, tokens: int, bits: int
) -> dict[tuple[int, int], Any]:
    """256·Σ(w+128)·high + Σ(w+128)·low + offset for each strip and token, or without `high`, <16 x i32>."""
    planes = PLANES[bits]
    b, wide, bytes_ = e.b, vector(I32, 16), vector(I8, TILE_BYTES)
    flip = e.constant(I8(-128), TILE_BYTES)
    offsets = e.places(a.offsets, a.stride, tokens)
    keys = [(s, t, plane) for t in range(tokens) for plane in range(planes) for s in range(strips)]
    start = [
        e.splat(e.load(I32, offsets[t]), 16) if plane == planes - 1 else ir.Constant(wide, None) for _, t, plane in keys
    ]

    def tile(tiles: Any, levels: Any, sums: list[Any], at: int = 0) -> list[Any]:
        weights = [
            b.xor(e.load(bytes_, place, at * TILE_BYTES), flip) for place in e.places(tiles, w.tile_stride, strips)
        ]
        spread = [
            b.bitcast(e.splat(e.load(I32, place, at * 4 + plane * 32), 16), bytes_)
            for place in e.places(levels, a.level_stride, tokens)
            for plane in range(planes)
        ]
        return [
            e.call("llvm.x86.avx512.vpdpbusd.512", wide, old, weights[s], spread[planes * t + plane])
            for old, (s, t, plane) in zip(sums, keys, strict=True)
        ]

    sums = _over_tiles(e, (w.tiles, a.levels), 4, start, tile=tile, unroll=strips * tokens <= 2)
    by_key = dict(zip(keys, sums, strict=True))
    if planes == 1:
        return {(s, t): total for (s, t, _), total in by_key.items()}
    shift = e.constant(I32(8), 16)
    return {(s, t): b.add(b.shl(by_key[s, t, 0], shift), by_key[s, t, 1]) for s, t, plane in keys if plane}


def _sums_portable(
    e: Emitter,
    w: WeightGroup,
    strips: int,
    a: LevelGroup,
    tokens: int,
    bits: int,  # noqa: ARG001
) -> dict[tuple[int, int], Any]:
    """Σ w·a for each strip and token, <16 x i32>."""
    b = e.b
    keys = [(s, t) for t in range(tokens) for s in range(strips)]

    def tile(tiles: Any, levels: Any, sums: list[Any], at: int) -> list[Any]:
        weights = [
            e.even_and_odd(e.load(vector(I8, TILE_BYTES), place, at * TILE_BYTES))
            for place in e.places(tiles, w.tile_stride, strips)
        ]
        places = e.places(levels, a.level_stride, tokens)
        return [b.add(old, e.fours(weights[s], places[t], at * 8)) for old, (s, t) in zip(sums, keys, strict=True)]

    start = [ir.Constant(vector(I32, 16), None)] * len(keys)
    sums = _over_tiles(e, (w.tiles, a.levels), 8, start, tile=tile, unroll=strips * tokens == 1)
    return dict(zip(keys, sums, strict=True))


def _over_tiles(
    e: Emitter,
    begin: tuple[Any, Any],
    level_bytes: int,
    sums: list[Any],
    *,
    tile: Callable[..., list[Any]],
    unroll: bool,
) -> list[Any]:
    """Take the sums through all tiles by `tile` (address of weights, address of levels, sums so far, tile's number).

    `begin` holds the two addresses of the first tile; each tile takes `level_bytes` of levels.
    """
    tiles, levels = begin
    if unroll:
        for at in range(TILES):
            sums = tile(tiles, levels, sums, at)
        return sums
    # This is a loop whose end LLVM does not see. Unrolled, it would take the products in another order, in which sums
    # wait for each other and do not fit into registers.
    limit = e.opaque(e.b.add(tiles, I64(TILES * TILE_BYTES)))

    def body(tiles: Any, carried: list[Any]) -> list[Any]:
        levels, *old = carried
        return [e.b.add(levels, I64(level_bytes)), *tile(tiles, levels, old, 0)]

    return e.loop(tiles, limit, TILE_BYTES, [levels, *sums], body)[1:]


def groups_step(strips: int, tokens: int, vnni: bool, bits: int, halves: bool) -> Any:
    """The step for `strips` × `tokens`, callable from a kernel as step(WeightGroup, LevelGroup, groups, y, y_stride).

    It takes so many groups, the first of which lie where the records say; the others follow them. Activations have so
    many `bits`. Scales are float16 if they are `halves`, and float32 if not. y is the address of float32. y_stride
    leads to the next token, and strips are neighbours.
    """
    sums_of = _sums_vnni if vnni else _sums_portable
    level_bytes = GROUP * (PLANES[bits] if vnni else 2)
    keys = [(s, t) for t in range(tokens) for s in range(strips)]

    @intrinsic
    def step(typingctx, weights, levels, groups, y, y_stride):  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b = Emitter(builder), builder
            first_weights, first_levels = e.record(WeightGroup, args[0]), e.record(LevelGroup, args[1])
            groups, y, y_stride = args[2:]

            def one_group(_: Any, carried: list[Any]) -> list[Any]:
                tiles, scales_at, levels, factors_at, offsets, *floats = carried
                w = first_weights._replace(tiles=tiles, scales=scales_at)
                a = first_levels._replace(levels=levels, factors=factors_at, offsets=offsets)
                sums = sums_of(e, w, strips, a, tokens, bits)
                places = e.places(w.scales, w.scale_stride, strips)
                if halves:
                    by_unit = e.splat(w.unit, 16)
                    scales = [b.fmul(e.halves(place), by_unit) for place in places]
                else:
                    scales = [e.load(vector(F32, 16), place) for place in places]
                factors = [e.splat(e.load(F32, place), 16) for place in e.places(a.factors, a.stride, tokens)]
                added = [
                    e.plus_product(old, sums[s, t], b.fmul(scales[s], factors[t]))
                    for old, (s, t) in zip(floats, keys, strict=True)
                ]
                following = (
                    b.add(at, I64(step))
                    for at, step in (
                        (tiles, TILES * TILE_BYTES),
                        (scales_at, 16 * (2 if halves else 4)),
                        (levels, level_bytes),
                        (factors_at, 4),
                        (offsets, 4),
                    )
                )
                return [*following, *added]

            outs = e.places(y, y_stride, tokens)
            at = {(s, t): b.add(outs[t], I64(64 * s)) for s, t in keys}
            start = [
                first_weights.tiles, first_weights.scales, first_levels.levels, first_levels.factors,
                first_levels.offsets, *(e.load(vector(F32, 16), at[key]) for key in keys),
            ]  # fmt: skip
            for key, value in zip(keys, e.loop(I64(0), groups, 1, start, one_group)[5:], strict=True):
                e.store(value, at[key])
            return context.get_dummy_value()

        return types.void(weights, levels, types.int64, types.int64, types.int64), generate

    return step


class RowGroup(NamedTuple):
    """Some rows of a group of 32, and where they go: int64 addresses, and a stride in bytes."""

    weights: int
    """The outputs' weights in row 0."""
    stride: int
    """From one row to the next."""
    rows: int
    """int64, the rows' numbers."""
    levels: int
    """int16, one a row."""
    level_stride: int
    """From one token to the next."""
    length: int
    """How many rows: an even number above 0."""
    scales: int
    """float16 bits, one an output."""
    factors: int
    """float32, one a token, `factor_stride` apart."""
    factor_stride: int
    totals: int
    """float32, one an output; `total_stride` leads to the next token."""
    total_stride: int


def rows_step(vnni: bool, width: int, tokens: int) -> Any:
    """total[t, i] += (Σ_n w[rows[n], i] · level[t, n]) · (scale[i] · unit) · factor[t] for `width` outputs i.

    It is callable as step(RowGroup, unit), float32 (see `groups_step`). Bytes of two rows are interleaved, so that one
    `vpdpwssd` (or `pmaddwd`) adds both products into an output's lane.
    """

    @intrinsic
    def step(typingctx, rows, unit):  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b = Emitter(builder), builder
            g, unit = e.record(RowGroup, args[0]), args[1]
            keys = [(t, i) for i in range(width // 16) for t in range(tokens)]

            def two_rows(n: Any, sums: list[Any]) -> list[Any]:
                places = e.two_rows(g, n, g.weights)
                levels = e.level_pairs(g, n, tokens)
                values = [
                    e.widen(e.interleaved([e.load(vector(I8, 16), place, 16 * i) for place in places]), I16)
                    for i in range(width // 16)
                ]
                return [
                    e.add_pairs(total, values[i], levels[t], vnni) for total, (t, i) in zip(sums, keys, strict=True)
                ]

            zero = ir.Constant(vector(I32, 16), None)
            sums = e.loop(I64(0), g.length, 2, [zero] * len(keys), two_rows)
            by_unit = e.splat(unit, 16)
            scales = [b.fmul(e.halves(b.add(g.scales, I64(32 * i))), by_unit) for i in range(width // 16)]
            e.add_rows(g, tokens, dict(zip(keys, sums, strict=True)), scales)
            return context.get_dummy_value()

        return types.void(rows, types.float32), generate

    return step
