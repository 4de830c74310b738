"""Steps on codes of 4, 5 or 6 bits (docs/format.md): to int8 levels, and to products with one token.

Eight pieces of U codes lie in slices of U bytes: of the first four, slice p holds the lower four bits of piece 2p in
the lower and those of piece 2p + 1 in the upper half of each byte. Of 5 bits, bit m of slice 4 is the fifth bit of
piece m. Of 6 bits, bits 2i and 2i + 1 of slice 4 + v are the upper two of piece 4v + i.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from rwkv_cli.kernels.cpu.llvm.emitter import F32, I8, I16, I32, I64, Emitter, vector
from rwkv_cli.kernels.cpu.llvm.int8_dot import PLANES, TILE_BYTES, LevelGroup
from rwkv_cli.numbers import LEVELS

PIECES = 8

Slices = Callable[[int], Any]
"""A function of a slice's number, which emits the code that loads it, <U x i8>."""


def _shifted(e: Emitter, x: Any, by: int) -> Any:
    """Bytes shifted to the left, or to the right by −`by`. Bits cross from byte to byte: mask what is wanted."""
    if by == 0:
        return x
    words = e.b.bitcast(x, vector(I16, x.type.count // 2))
    count = e.constant(I16(abs(by)), words.type.count)
    return e.b.bitcast(e.b.shl(words, count) if by > 0 else e.b.lshr(words, count), x.type)


def levels_of(e: Emitter, bits: int, piece: int, slices: Slices, offset: int = 0) -> Any:
    """The levels of a piece, each plus `offset`, <U x i8>."""
    b, table = e.b, [level + offset for level in LEVELS[bits]]
    slice_ = slices(piece // 2)
    n = slice_.type.count
    low = b.and_(_shifted(e, slice_, -4 * (piece % 2)), e.constant(I8(15), n))
    if bits == 4:
        return e.lookup(table, low)
    if bits == 5:
        fifth = b.and_(slices(4), e.constant(I8(1 << piece), n))
        upper = b.icmp_unsigned("!=", fifth, e.constant(I8(0), n))
        return b.select(upper, e.lookup(table[16:], low), e.lookup(table[:16], low))
    assert bits == 6
    high = b.and_(_shifted(e, slices(4 + piece // 4), 4 - 2 * (piece % 4)), e.constant(I8(0x30), n))
    return b.add(b.or_(low, high), e.constant(I8(table[0]), n))


def _tile_slices(e: Emitter, address: Any) -> Slices:
    return lambda slice_: e.load(vector(I8, TILE_BYTES), address, TILE_BYTES * slice_)


def expand_tile(bits: int) -> Any:
    """expand(values, tiles): the 16 × 32 codes at address `values` as levels, int8 [8, 16, 4], at address `tiles`."""

    @intrinsic
    def expand(typingctx, values, tiles):  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e = Emitter(builder)
            slices = _tile_slices(e, args[0])
            for piece in range(PIECES):
                e.store(levels_of(e, bits, piece, slices), builder.add(args[1], I64(TILE_BYTES * piece)))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return expand


def expand_columns(bits: int) -> Any:
    """expand(values, stride, pair, tiles, tile_stride): four columns of 128 codes as levels in two tiles.

    `values` is the address of the first column, and `stride` leads to the next. Pair p of strips 2p and 2p + 1 goes to
    a tile at `tiles` and one `tile_stride` bytes behind it. All are int64.
    """

    @intrinsic
    def expand(typingctx, values, stride, pair, tiles, tile_stride):  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b = Emitter(builder), builder
            values, stride, pair, tiles, tile_stride = args
            slices = _pair_slices(e, bits, e.places(values, stride, 4), pair)
            for strip in range(2):
                e.store(levels_of(e, bits, strip, slices), b.add(tiles, b.mul(tile_stride, I64(strip))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return expand


class CodeGroup(NamedTuple):
    """The place of a group of 16 rows × 32 columns: int64 addresses of codes, int8 scales, and float32 row factors."""

    values: int
    scales: int
    rows: int


def code_step(bits: int, vnni: bool, activation_bits: int) -> Any:
    """step(CodeGroup, LevelGroup, y): y[i] += (Σ_c level[i, c] · a[c]) · (scale[i] · row[i]) · factor for 16 rows i.

    It is `int8_dot.groups_step` for one strip and one token, of codes.
    """
    planes = PLANES[activation_bits]

    @intrinsic
    def step(typingctx, weights, levels, y):  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b, wide = Emitter(builder), builder, vector(I32, 16)
            w, a, y = e.record(CodeGroup, args[0]), e.record(LevelGroup, args[1]), args[2]
            slices = _tile_slices(e, w.values)
            if vnni:
                # the sums of both planes, or of every other piece of one: they do not wait for each other
                totals = [ir.Constant(wide, None), e.splat(e.load(I32, a.offsets), 16)]
                for piece in range(PIECES):
                    tile = levels_of(e, bits, piece, slices, 128)
                    for plane in range(planes):
                        four = b.bitcast(e.splat(e.load(I32, a.levels, 4 * piece + 32 * plane), 16), tile.type)
                        i = plane if planes == 2 else piece % 2
                        totals[i] = e.call("llvm.x86.avx512.vpdpbusd.512", wide, totals[i], tile, four)
                high, low = totals
                sums = b.add(b.shl(high, e.constant(I32(8), 16)) if planes == 2 else high, low)
            else:
                sums = ir.Constant(wide, None)
                for piece in range(PIECES):
                    tile = e.even_and_odd(levels_of(e, bits, piece, slices))
                    sums = b.add(sums, e.fours(tile, a.levels, 8 * piece))
            scales = b.fmul(e.bytes_as_floats(w.scales), e.load(vector(F32, 16), w.rows))
            e.add_product(y, sums, b.fmul(scales, e.splat(e.load(F32, a.factors), 16)))
            return context.get_dummy_value()

        return types.void(weights, levels, types.int64), generate

    return step


class CodeRows(NamedTuple):
    """Some columns of a group of 32, of a block of 128 rows, and where they go: int64 addresses, strides in bytes."""

    values: int
    """The codes of column 0."""
    stride: int
    """From one column to the next."""
    rows: int
    """int64, the columns' numbers."""
    levels: int
    """int16, one a column."""
    level_stride: int
    """From one token to the next."""
    length: int
    """How many columns: an even number above 0."""
    scales: int
    """int8, one a row of the block."""
    by_row: int
    """float32, one a row of the block."""
    factors: int
    """float32, one a token, `factor_stride` apart."""
    factor_stride: int
    totals: int
    """float32, one a row of the block; `total_stride` leads to the next token."""
    total_stride: int


def code_rows_step(bits: int, vnni: bool) -> Any:
    """step(CodeRows): total[i] += (Σ_n level[columns[n], i] · levels[n]) · (scale[i] · row[i]) · factor, one token.

    i runs over all 128 rows of the block. It is `int8_dot.rows_step` of codes.
    """

    @intrinsic
    def step(typingctx, group):  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, g = Emitter(builder), Emitter(builder).record(CodeRows, args[0])

            def two_columns(n: Any, sums: list[Any]) -> list[Any]:
                places, (levels,) = e.two_rows(g, n, g.values), e.level_pairs(g, n, 1)
                loaded: dict[int, Any] = {}

                def slices(slice_: int) -> Any:
                    if slice_ not in loaded:
                        loaded[slice_] = e.interleaved([e.load(vector(I8, 16), place, 16 * slice_) for place in places])
                    return loaded[slice_]

                return [
                    e.add_pairs(total, e.widen(levels_of(e, bits, piece, slices), I16), levels, vnni)
                    for piece, total in enumerate(sums)
                ]

            zero = ir.Constant(vector(I32, 16), None)
            sums = e.loop(I64(0), g.length, 2, [zero] * PIECES, two_columns)
            scales = [_row_scales(e, g, I64(16 * i)) for i in range(PIECES)]
            e.add_rows(g, 1, {(0, i): value for i, value in enumerate(sums)}, scales)
            return context.get_dummy_value()

        return types.void(group), generate

    return step


def code_pair_step(bits: int, vnni: bool, tokens: int) -> Any:
    """step(CodeRows, pair): `code_rows_step` for some tokens and the 32 rows of strips 2·pair and 2·pair + 1 alone."""

    @intrinsic
    def step(typingctx, group, pair):  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b = Emitter(builder), builder
            g, pair = e.record(CodeRows, args[0]), args[1]
            keys = [(t, i) for i in range(2) for t in range(tokens)]

            def two_columns(n: Any, sums: list[Any]) -> list[Any]:
                slices = _pair_slices(e, bits, e.two_rows(g, n, g.values), pair)
                levels = e.level_pairs(g, n, tokens)
                values = [e.widen(levels_of(e, bits, i, slices), I16) for i in range(2)]
                return [
                    e.add_pairs(total, values[i], levels[t], vnni) for total, (t, i) in zip(sums, keys, strict=True)
                ]

            zero = ir.Constant(vector(I32, 16), None)
            sums = e.loop(I64(0), g.length, 2, [zero] * len(keys), two_columns)
            first = b.mul(pair, I64(32))
            scales = [_row_scales(e, g, b.add(first, I64(16 * i))) for i in range(2)]
            here = g._replace(totals=b.add(g.totals, b.mul(first, I64(4))))
            e.add_rows(here, tokens, dict(zip(keys, sums, strict=True)), scales)
            return context.get_dummy_value()

        return types.void(group, types.int64), generate

    return step


def _row_scales(e: Emitter, group: CodeRows, row: Any) -> Any:
    """scale · factor of 16 rows of a block from `row` on."""
    by_row = e.load(vector(F32, 16), e.b.add(group.by_row, e.b.mul(row, I64(4))))
    return e.b.fmul(e.bytes_as_floats(e.b.add(group.scales, row)), by_row)


def _pair_slices(e: Emitter, bits: int, columns: list[Any], pair: Any) -> Slices:
    """The slices of some columns, interleaved, so that pieces 0 and 1 are those of strips 2·pair and 2·pair + 1."""
    b = e.b

    def together(offset: Any) -> Any:
        return e.interleaved([e.load(vector(I8, 16), b.add(column, offset)) for column in columns])

    low = together(b.mul(pair, I64(16)))
    if bits == 4:
        return lambda _: low
    # which pieces they are is known when it runs, so their upper bits are brought to where pieces 0 and 1 have theirs
    slice_ = b.lshr(pair, I64(1)) if bits == 6 else I64(0)
    by = b.mul(b.and_(pair, I64(1)), I64(4)) if bits == 6 else b.mul(pair, I64(2))
    high = together(b.add(I64(64), b.mul(slice_, I64(16))))
    words = b.bitcast(high, vector(I16, high.type.count // 2))
    high = b.bitcast(b.lshr(words, e.splat(b.trunc(by, I16), words.type.count)), high.type)
    return lambda slice_: high if slice_ >= 4 else low
