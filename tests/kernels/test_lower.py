"""How the CPU lowers operations: what is fused, what is shared, and where a barrier stands. Nothing is run."""

from typing import Any

import numpy as np
import pytest
from lab import Lab, normal, quantize

from rwkv_cli.kernels.cpu.lower import LOWER
from rwkv_cli.kernels.cpu.lowering import Lowering
from rwkv_cli.kernels.program import (
    AddLinear,
    Columns,
    Count,
    InputMatrix,
    LayerNorm,
    Lerp,
    Norm,
    Operation,
    Product,
    Program,
    RoundTo,
)
from rwkv_cli.quant.formats import Floats


def lowered(program: Program) -> tuple[list[str], list[bool], Lowering]:
    """The names of the kernels, whether a barrier follows each, and the lowering itself."""
    low = Lowering(threads=2)
    for operation in program.operations:
        LOWER[type(operation)](low, operation)
    return [kernel.name for kernel in low.steps.kernels], low.steps.barriers, low


def matrix(rows: int, columns: int, name: str = "x") -> InputMatrix:
    return InputMatrix(Count(rows), columns, name=name)


def weight(N: int, K: int, layout: str = "tile") -> Any:
    return Lab().weight(quantize(normal(N, K), layout))


def test_every_operation_is_lowered() -> None:
    kinds, found = [Operation], set()
    while kinds:
        below = kinds.pop().__subclasses__()
        kinds += below
        found |= {kind for kind in below if not kind.__name__.startswith("_")}
    assert found == set(LOWER)


def test_a_factor_is_rounded_once_for_all_its_readers() -> None:
    program, x = Program(), matrix(1, 64)
    mix = Lerp(x, matrix(1, 64, "delta"), np.zeros((1, 64), np.float32))
    program.linear(Product(x, weight(32, 64)), Product(mix, weight(32, 64)), Product(x, weight(16, 64)))
    names, barriers, _ = lowered(program)
    assert names == ["quantize", "quantize", "tiles", "tiles", "tiles"]
    assert barriers == [False, True, False, False, True], "products of one Linear run at the same time"


@pytest.mark.parametrize("T", [1, 9])
def test_bias_and_activation_are_taken_in_the_product(T: int) -> None:
    program, bias = Program(), np.zeros((1, 32), np.float32)
    program.linear(Product(matrix(T, 64), weight(32, 64), "tanh", bias))
    names, _, low = lowered(program)
    assert names == ["quantize", "tiles"]
    assert low.steps.records[1].bias is bias
    # not where the last strip has rows that are padding
    program = Program()
    program.linear(Product(matrix(T, 64), weight(40, 64), "tanh", np.zeros((1, 40), np.float32)))
    names, barriers, _ = lowered(program)
    assert names == ["quantize", "tiles", "finish"]
    assert barriers == [True, True, True]


def test_a_product_is_added_in_place() -> None:
    program, x = Program(), matrix(1, 64)
    y = program.add(LayerNorm(x, Norm(np.ones(64, np.float32), np.zeros(64, np.float32), 1e-5)))
    program.add(AddLinear(y, x, weight(64, 64)))
    names, _, low = lowered(program)
    assert names == ["layer_norm", "quantize", "tiles"]
    assert low.steps.records[2].y == low.view(y)
    assert low.steps.records[2].add


def test_a_sparse_input_is_searched_for_zeros() -> None:
    for T in (1, 2):
        program = Program()
        program.linear(Product(matrix(T, 64), weight(256, 64, "columns")))
        assert lowered(program)[0] == ["quantize", "find_nonzero", "columns"]


@pytest.mark.parametrize("layout", ["columns", "columns4", "columns6"])
def test_many_tokens_share_a_sparse_matrix_in_small_parts(layout: str) -> None:
    """Two strips are a part: threads that come late, or are many, find some left."""
    program = Program()
    program.linear(Product(matrix(252, 64), weight(1024, 64, layout)))
    _, _, low = lowered(program)
    assert low.steps.shares[-1].most == 1024 // 32


def test_columns_of_a_matrix_are_read_where_they_lie() -> None:
    program, x = Program(), matrix(3, 96)
    program.linear(Product(Columns(x, 32, 64), weight(32, 64)))
    names, _, low = lowered(program)
    assert names == ["quantize", "tiles"]
    assert (low.steps.records[0].x.offset, low.steps.records[0].stride) == (4 * 32, 4 * 96)
    program = Program()
    program.linear(Product(Columns(x, 32, 64), Lab().weight(Floats("float", "F32", normal(8, 64)))))
    assert lowered(program)[0] == ["take_columns", "floats"]


def test_memory_is_planned_for_the_most_rows_and_used_again() -> None:
    """A chain of norms of up to 100 rows needs two places, and the rounding in place none of its own."""
    program, norm = Program(), Norm(np.ones(64, np.float32), np.zeros(64, np.float32), 1e-5)
    value: Any = matrix(100, 64)
    given = value
    for _ in range(10):
        value = program.add(LayerNorm(value, norm))
        program.add(RoundTo(value, "BF16"))
    _, _, low = lowered(program)
    low.steps.keep(low.view(value))
    assert len(low.steps.finish([given])._workspace) == 2 * 100 * 64 * 4
