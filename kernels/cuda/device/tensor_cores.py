"""Products of a warp's fragments on tensor cores (docs/cuda.md).

Every function has a twin of the same name in `simulated`.
"""

from typing import Any

from llvmlite import ir

from rwkv_cli.kernels.cuda.device.emit import F32, FOUR, FOUR_FLOATS, I32, capability, emits, types


def _mma(
    b: Any, shape: str, weights: list[Any], levels: list[Any], sums: list[Any], kinds: str = "s32.s8.s8.s32"
) -> list[Any]:
    """sums + weights · levels by one mma.sync of `shape` and `kinds`. Each list has the registers of one matrix."""
    n, at, groups = len(sums), 0, []
    for count in (n, len(weights), len(levels), n):
        groups.append("{" + ", ".join(f"${at + i}" for i in range(count)) + "}")
        at += count
    operands = [*weights, *levels, *sums]
    text = f"mma.sync.aligned.{shape}.row.col.{kinds} {', '.join(groups)};"
    of_sums, of_sum = ("f", F32) if kinds.startswith("f32") else ("r", I32)
    constraints = ",".join([f"={of_sums}"] * n + ["r"] * (len(operands) - n) + [of_sums] * n)
    kind = ir.FunctionType(ir.LiteralStructType([of_sum] * n), [I32] * (len(operands) - n) + [of_sum] * n)
    # The whole warp takes part. A volatile call is moved into no branch.
    done = b.call(ir.InlineAsm(kind, text, constraints, side_effect=True), operands)
    return [b.extract_value(done, i) for i in range(n)]


def _add_products(b: Any, weights: list[Any], levels: list[Any], sums: list[Any]) -> list[Any]:
    """sums + one plane of levels times weights, for 16 rows × 8 tokens × 32 columns."""
    if capability() >= (8, 0):
        return _mma(b, "m16n8k32", weights, levels, sums)
    # Turing's tensor cores take 8 rows × 8 tokens × 16 columns at a time: columns and then rows in halves.
    left, left_8, right, right_8 = weights
    first, second = levels
    sum_0, sum_1, sum_2, sum_3 = sums
    upper = _mma(b, "m8n8k16", [left], [first], [sum_0, sum_1])
    upper = _mma(b, "m8n8k16", [right], [second], upper)
    lower = _mma(b, "m8n8k16", [left_8], [first], [sum_2, sum_3])
    return [*upper, *_mma(b, "m8n8k16", [right_8], [second], lower)]


def _products_of(planes: int) -> Any:
    """A function of a lane's parts of a weight and an activation fragment, with levels of so many planes."""

    @emits(FOUR, FOUR, FOUR, types.int64, types.int64, types.int64, types.int64)
    def products(
        b: Any,
        weights: Any,
        levels: Any,
        lane: Any,  # noqa: ARG001
        weights_at: Any,  # noqa: ARG001
        bits: Any,  # noqa: ARG001
        levels_at: Any,  # noqa: ARG001
    ) -> list[Any]:
        w, x = ([b.extract_value(each, i) for i in range(4)] for each in (weights, levels))
        sums = _add_products(b, w, x[:2], [I32(0)] * 4)
        return sums if planes == 1 else _add_products(b, w, x[2:], [b.shl(high, I32(8)) for high in sums])

    return products


products = _products_of(2)
"""A warp's 16 rows × 8 tokens over 32 columns: Σ w·(256·high + low), int32, four of them in each lane.

Weights and levels are this lane's int8 of a weight and an activation fragment (docs/cuda.md). With the lane follow the
address of the weights, the bits that they are stored in, and the address of the levels, which only the simulator reads.
Lane 4g + t gets (row g, token 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
"""
products_8 = _products_of(1)
"""`products` with levels of 8 bits, which are one plane: Σ w·level. The last two of the levels are not read."""


@emits(FOUR, FOUR, FOUR, FOUR)
def plane_products(b: Any, weights: Any, levels: Any, sums: Any) -> list[Any]:
    """sums + Σ w·high + Σ w·low: what tensor cores do of `products`, and nothing beside it."""
    w, x, onto = ([b.extract_value(each, i) for i in range(4)] for each in (weights, levels, sums))
    return _add_products(b, w, x[2:], _add_products(b, w, x[:2], onto))


@emits(FOUR_FLOATS, types.UniTuple(types.int32, 8), FOUR, FOUR_FLOATS)
def half_products(b: Any, weights: Any, levels: Any, sums: Any) -> list[Any]:
    """sums + a warp's 16 rows × 8 tokens over 32 columns, in float16 but for the sums, which lie as in `products`.

    Two of a lane's numbers are in each int32. Weights are those of columns 4t and 4t + 1 of row g and of row g + 8,
    then of the next two columns of both rows; then come columns 4t + 16 … likewise. Levels are token g's of columns
    4t … and of 4t + 16 ….
    """
    w, x, onto = (
        [b.extract_value(weights, i) for i in range(8)],
        *([b.extract_value(each, i) for i in range(4)] for each in (levels, sums)),
    )
    kinds = "f32.f16.f16.f32"
    if capability() >= (8, 0):
        onto = _mma(b, "m16n8k16", w[:4], x[:2], onto, kinds)
        return _mma(b, "m16n8k16", w[4:], x[2:], onto, kinds)
    for i in range(4):
        onto = _mma(b, "m16n8k8", w[2 * i : 2 * i + 2], x[i : i + 1], onto, kinds)
    return onto
