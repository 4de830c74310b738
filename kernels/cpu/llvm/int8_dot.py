"""LLVM code for the inner step of the int8 matmul: one group of 32 columns, some strips of 16 rows, some tokens.

    y[t, s·16 + i] += (Σ_c w[s, c, i] · a[t, c]) · (scale[s, i] · unit) · factor[t]      i < 16, c < 32

The sum is exact in int32; the rest is float32. Weights lie in tiles of 16 rows × 4 columns, so that one instruction
multiplies a tile with 4 activations and adds each row's 4 products into its own lane: no horizontal sums.

Activations are int16 (quantized to ±32512 in the same groups of 32). Two forms of the same sum:

- AVX-512 VNNI: `vpdpbusd` multiplies unsigned by signed bytes, so a weight w enters as w + 128 (one xor) and an
  activation as two signed planes, a = 256·high + low: of a group, 32 bytes of one and then 32 of the other.
  `offset[t]` = −128 · Σ_c a[t, c] takes the 128 back out.
- Portable: both are widened to 16 bits, multiplied and added in pairs (`pmaddwd` on x86; LLVM finds `smlal` on Arm).
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from rwkv_cli.kernels.cpu.llvm.emitter import F32, I8, I16, I32, I64, Emitter, vector

TILES = 8
"""Tiles of 4 columns in a group of 32."""
TILE_BYTES = 64


def _opaque(e: Emitter, value: Any) -> Any:
    """The value, which LLVM then knows nothing about."""
    return e.b.asm(ir.FunctionType(value.type, [value.type]), "", "=r,0", [value], False)


def _sums_vnni(
    e: Emitter, w: Any, w_stride: Any, strips: int, a: Any, a_stride: Any, tokens: int, offsets: list[Any]
) -> dict[tuple[int, int], Any]:
    """256·Σ(w+128)·high + Σ(w+128)·low + offset for each strip and token, <16 x i32>."""
    b, wide = e.b, vector(I32, 16)
    bytes_ = vector(I8, TILE_BYTES)
    dot = get_or_insert_function(
        b.module, ir.FunctionType(wide, [wide, bytes_, bytes_]), "llvm.x86.avx512.vpdpbusd.512"
    )
    flip = ir.Constant(bytes_, [I8(-128)] * TILE_BYTES)
    keys = [(s, t, plane) for t in range(tokens) for plane in range(2) for s in range(strips)]
    start = [e.splat(e.load(I32, offsets[t]), 16) if plane else ir.Constant(wide, None) for _, t, plane in keys]

    def tile(w: Any, a: Any, sums: list[Any], at: int = 0) -> list[Any]:
        weights = [b.xor(e.load(bytes_, place, at * TILE_BYTES), flip) for place in e.steps(w, w_stride, strips)]
        levels = [
            b.bitcast(e.splat(e.load(I32, place, at * 4 + plane * 32), 16), bytes_)
            for place in e.steps(a, a_stride, tokens)
            for plane in range(2)
        ]
        return [
            b.call(dot, [old, weights[s], levels[2 * t + plane]])
            for old, (s, t, plane) in zip(sums, keys, strict=True)
        ]  # fmt: skip

    sums = _over_tiles(e, w, a, 4, start, tile, unroll=strips * tokens <= 2)
    shift = ir.Constant(wide, [I32(8)] * 16)
    by_key = dict(zip(keys, sums, strict=True))
    return {(s, t): b.add(b.shl(by_key[s, t, 0], shift), by_key[s, t, 1]) for s, t, plane in keys if plane}


def _over_tiles(
    e: Emitter, w: Any, a: Any, a_bytes: int, start: list[Any], tile: Callable[..., list[Any]], unroll: bool
) -> list[Any]:
    """What `tile` (address of weights, address of levels, sums so far, number) makes of `start`, tile after tile, each
    `a_bytes` of levels further."""
    if unroll:
        for at in range(TILES):
            start = tile(w, a, start, at)
        return start
    # a loop, and one that LLVM does not see the end of: unrolled, it would take the products in another order,
    # in which sums wait for each other and do not fit into registers
    b = e.b
    before, body, end = b.block, b.append_basic_block(), b.append_basic_block()
    last = _opaque(e, b.add(w, I64((TILES - 1) * TILE_BYTES)))
    b.branch(body)
    b.position_at_end(body)
    w_now, a_now, old = b.phi(I64), b.phi(I64), [b.phi(value.type) for value in start]
    sums = tile(w_now, a_now, old, 0)
    new = [b.add(w_now, I64(TILE_BYTES)), b.add(a_now, I64(a_bytes)), *sums]
    for now, first, following in zip([w_now, a_now, *old], [w, a, *start], new, strict=True):
        now.add_incoming(first, before)
        now.add_incoming(following, body)
    b.cbranch(b.icmp_unsigned("<", w_now, last), body, end)
    b.position_at_end(end)
    return sums


def _sums_portable(
    e: Emitter, w: Any, w_stride: Any, strips: int, a: Any, a_stride: Any, tokens: int
) -> dict[tuple[int, int], Any]:
    """Σ w·a for each strip and token, <16 x i32>."""
    b = e.b
    keys = [(s, t) for t in range(tokens) for s in range(strips)]

    def tile(w: Any, a: Any, sums: list[Any], at: int) -> list[Any]:
        weights = [
            e.widen(e.load(vector(I8, TILE_BYTES), place, at * TILE_BYTES), I16)
            for place in e.steps(w, w_stride, strips)
        ]  # fmt: skip
        levels = [
            b.bitcast(e.splat(e.load(I64, place, at * 8), 16), vector(I16, 64))
            for place in e.steps(a, a_stride, tokens)
        ]  # fmt: skip
        return [b.add(old, e.pairs(weights[s], levels[t])) for old, (s, t) in zip(sums, keys, strict=True)]

    start = [ir.Constant(vector(I32, 32), None)] * len(keys)
    sums = _over_tiles(e, w, a, 8, start, tile, unroll=strips * tokens == 1)
    both = dict(zip(keys, sums, strict=True))
    return {key: b.add(e.pick(pair, range(0, 32, 2)), e.pick(pair, range(1, 32, 2))) for key, pair in both.items()}


def group_step(strips: int, tokens: int, vnni: bool) -> Callable[..., None]:
    """The step for `strips` × `tokens` as a function of addresses and byte strides, callable from a kernel.

    Arguments, all int64 but the last: w, w_stride (tiles of a strip) · a, a_stride (activations of a token) · scale,
    scale_stride (float16 bits) · factor, factor_stride (float32) · offset, offset_stride (int32) · y, y_stride
    (float32) · unit (float32). A stride leads to the next strip for w and scale, to the next token for a, factor,
    offset and y; strips are neighbours in y. `unit` includes 2**112, since float16 bits shifted into a float32 stand
    for 2**-112 of their value.
    """

    @intrinsic
    def step(  # type: ignore[no-untyped-def]
        typingctx, w, w_stride, a, a_stride, scale, scale_stride,  # noqa: ARG001
        factor, factor_stride, offset, offset_stride, y, y_stride, unit,  # noqa: ARG001
    ):  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b = Emitter(builder), builder
            w, w_stride, a, a_stride, scale, scale_stride, *rest = args
            factor, factor_stride, offset, offset_stride, y, y_stride, unit = rest
            by_unit = e.splat(unit, 16)

            factors, offsets = e.steps(factor, factor_stride, tokens), e.steps(offset, offset_stride, tokens)
            sums = (
                _sums_vnni(e, w, w_stride, strips, a, a_stride, tokens, offsets)
                if vnni
                else _sums_portable(e, w, w_stride, strips, a, a_stride, tokens)
            )
            scales = [b.fmul(e.halves(place), by_unit) for place in e.steps(scale, scale_stride, strips)]
            for t, out in enumerate(e.steps(y, y_stride, tokens)):
                by = e.splat(e.load(F32, factors[t]), 16)
                for s in range(strips):
                    e.add_product(b.add(out, I64(64 * s)), sums[s, t], b.fmul(scales[s], by))
            return context.get_dummy_value()

        return types.void(*([types.int64] * 12), types.float32), generate

    return step


def rows_step(vnni: bool, width: int) -> Callable[..., None]:
    """total[i] += (Σ_n w[rows[n], i] · level[n]) · (scale[i] · unit) · factor for `width` outputs i and `count` rows.

    Arguments: addresses (int64) of the outputs' weights in row 0, of `rows` (int64), `levels` (int16), `scale` (float16
    bits) and `total` (float32), the distance of two rows, `count` (even and not 0), `factor` and `unit` (float32; see
    `group_step`). Bytes of two rows are interleaved, so that one `vpdpwssd` (or `pmaddwd`) adds both products into an
    output's lane.
    """

    @intrinsic
    def step(  # type: ignore[no-untyped-def]
        typingctx, w, rows, levels, scale, total, stride, count, factor, unit  # noqa: ARG001
    ):  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            e, b, wide = Emitter(builder), builder, vector(I32, 16)
            w, rows, levels, scale, total, stride, count, factor, unit = args
            order = ir.Constant(vector(I32, 32), [I32(i // 2 + 16 * (i % 2)) for i in range(32)])
            start, body, end = b.block, b.append_basic_block(), b.append_basic_block()
            b.branch(body)
            b.position_at_end(body)
            n, sums = b.phi(I64), [b.phi(wide) for _ in range(0, width, 16)]
            places = []
            for i in range(2):
                row = e.load(I64, b.add(rows, b.mul(n, I64(8))), 8 * i)
                places.append(b.add(w, b.mul(row, stride)))
            pair = e.load(I32, b.add(levels, b.mul(n, I64(2))))
            a = b.bitcast(e.splat(pair, 16), vector(I16, 32))
            new = []
            for i, sum_ in enumerate(sums):
                both = b.shuffle_vector(*(e.load(vector(I8, 16), place, 16 * i) for place in places), order)
                values = e.widen(both, I16)
                if vnni:
                    kind = ir.FunctionType(wide, [wide, wide, wide])
                    dot = get_or_insert_function(b.module, kind, "llvm.x86.avx512.vpdpwssd.512")
                    new.append(b.call(dot, [sum_, b.bitcast(values, wide), b.bitcast(a, wide)]))
                else:
                    new.append(b.add(sum_, e.pairs(values, a)))
            following = b.add(n, I64(2))
            n.add_incoming(I64(0), start)
            n.add_incoming(following, body)
            for sum_, value in zip(sums, new, strict=True):
                sum_.add_incoming(ir.Constant(wide, None), start)
                sum_.add_incoming(value, body)
            b.cbranch(b.icmp_signed("<", following, count), body, end)
            b.position_at_end(end)
            by, by_unit = e.splat(factor, 16), e.splat(unit, 16)
            for i, value in enumerate(new):
                scales = b.fmul(e.halves(b.add(scale, I64(32 * i))), by_unit)
                e.add_product(b.add(total, I64(64 * i)), value, b.fmul(scales, by))
            return context.get_dummy_value()

        return types.void(*([types.int64] * 7), types.float32, types.float32), generate

    return step
