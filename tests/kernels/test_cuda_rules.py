"""Rules that say what is one launch on a GPU: each on short lists of operations, without a GPU."""

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_cli.kernels import program as p

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (rwkv-cli[cuda])", allow_module_level=True)

from rwkv_cli.kernels.cuda import rules
from rwkv_cli.kernels.cuda.lower import LOWER
from rwkv_cli.kernels.cuda.rules import FloatProducts, Int8Products, NormShift, RoundFactors
from rwkv_cli.kernels.cuda.weights import FloatMatrix, Fragments

NOTHING: Any = None
ONE, MANY = p.Count(1), p.Count(9)
NORM = p.Norm(NOTHING, NOTHING, 1e-5)
STARTS = p.Input("starts", (2,), "I64")


def int8(N: int = 32, K: int = 32) -> Fragments:
    return Fragments((N, K), 8, NOTHING, NOTHING, N // 16, K // 32, False)


def floats(N: int = 32, K: int = 32) -> FloatMatrix:
    return FloatMatrix((N, K), NOTHING, "F32", K)


def value(rows: p.Count = MANY, columns: int = 32) -> p.Value:
    return p.Value(rows, columns)


def shift_of(x: p.Value) -> p.TokenShift:
    return p.TokenShift(x, STARTS, p.LayerState(p.Input("last", (1, 1, x.columns)), 0))


def wkv6(rows: p.Count, heads: int, head_size: int) -> p.Wkv6:
    x = value(rows, heads * head_size)
    state = p.LayerState(p.Input("wkv", (1, 1, heads, head_size, head_size)), 0)
    return p.Wkv6(
        receptance=x, key=x, value=x, decay=x, bonus=np.zeros((heads, head_size)), norm=NORM, gate=None, starts=STARTS,
        state=state,
    )  # fmt: skip


def test_every_operation_is_lowered() -> None:
    kinds, found = [p.Operation], set()
    while kinds:
        below = kinds.pop().__subclasses__()
        kinds += below
        found |= {kind for kind in below if not kind.__name__.startswith("_")}
    own = {NormShift, RoundFactors, Int8Products, FloatProducts}
    assert (found - {p.Linear, p.AddLinear}) | own == set(LOWER)


def test_a_norm_joins_the_shift_of_its_result() -> None:
    norm = p.LayerNorm(value(), NORM)
    shift = shift_of(norm.out)
    (joined,) = rules.join_norms([norm, shift])
    assert isinstance(joined, NormShift)
    assert (joined.norm, joined.shift) == (norm, shift)


def test_a_norm_joins_no_other_shift() -> None:
    norm, other = p.LayerNorm(value(), NORM), p.LayerNorm(value(), NORM)
    between = p.RoundTo(norm.out, "F16")
    for steps in (
        [norm, shift_of(value())], [norm, between, shift_of(norm.out)], [norm, other, shift_of(norm.out)],
        [norm], [shift_of(value())],
    ):  # fmt: skip
        assert rules.join_norms(steps) == steps


def test_a_shift_joins_one_norm() -> None:
    norm = p.LayerNorm(value(), NORM)
    first, second = shift_of(norm.out), shift_of(norm.out)
    joined, left = rules.join_norms([norm, first, second])
    assert isinstance(joined, NormShift)
    assert left is second


def test_products_of_a_linear_are_gathered() -> None:
    x = value()
    linear = p.Linear((p.Product(x, int8()), p.Product(x, floats()), p.Product(x, int8()), p.Product(x, floats())))
    in_int8, in_float = rules.gather_products([linear])
    assert isinstance(in_int8, Int8Products)
    assert isinstance(in_float, FloatProducts)
    a, b, c, d = linear.out
    assert [part.out for part in in_int8.parts] == [a, c]
    assert [part.out for part in in_float.parts] == [b, d]
    assert not any(part.add for part in (*in_int8.parts, *in_float.parts))


def test_linears_are_not_gathered_with_each_other() -> None:
    x = value()
    steps = rules.gather_products([p.Linear((p.Product(x, int8()),)), p.Linear((p.Product(x, int8()),))])
    assert [type(step) for step in steps] == [Int8Products, Int8Products]


@pytest.mark.parametrize("weight", [int8(), floats()])
def test_add_linear_adds(weight: Any) -> None:
    x, y = value(), value()
    (step,) = rules.gather_products([p.AddLinear(x, y, weight)])
    assert isinstance(step, Int8Products | FloatProducts)
    (part,) = step.parts
    assert (part.product.x, part.product.weight, part.out, part.add) == (y, weight, x, True)
    assert rules.changed_by(step) == {x}


def rounding(*operations: p.Operation[Any]) -> tuple[list[Any], set[p.Value]]:
    """The factors that are rounded before each launch of int8 products, and the values that their kernels round.

    All are rounded to 15 bits.
    """
    steps, wanted = rules.insert_rounding(rules.gather_products(operations))
    rounded: list[Any] = []
    for before, step in zip([None, *steps], steps, strict=False):
        if isinstance(step, Int8Products):
            factors = before.factors if isinstance(before, RoundFactors) else ()
            rounded.append([x for x, _ in factors])
            assert all(bits == 15 for _, bits in factors)
    assert set(wanted.values()) <= {15}
    return rounded, set(wanted)


def test_a_factor_is_rounded_to_the_bits_that_each_of_its_readers_wants() -> None:
    mix, by_columns = p.Lerp(value(), value(), value()), replace(int8(), by_columns=True)
    q4, q6 = replace(int8(), bits=4), replace(int8(), bits=6)
    x = value()
    reads = p.Linear(tuple(p.Product(*each) for each in ((mix, q4), (mix, q6), (x, q4), (mix, q4))))
    steps, wanted = rules.insert_rounding(rules.gather_products([reads]))
    first, _ = steps
    assert isinstance(first, RoundFactors)
    assert list(first.factors) == [(mix, 8), (mix, 15), (x, 15)]
    assert not wanted
    (made,) = (key := p.Linear((p.Product(value(ONE), int8(), "relu_squared"),))).out
    steps, wanted = rules.insert_rounding(rules.gather_products([key, p.AddLinear(value(ONE), made, by_columns)]))
    assert wanted == {made: 8}
    (made,) = (key := p.Linear((p.Product(value(ONE), int8()),))).out
    readers = p.Linear((p.Product(made, by_columns), p.Product(made, q6)))
    *_, second, _ = rules.insert_rounding(rules.gather_products([key, readers]))[0]
    assert isinstance(second, RoundFactors)
    assert list(second.factors) == [(made, 15)]  # its own kernel puts 8 bits
    wkv = wkv6(MANY, 1, 32)  # whose kernel puts 15 bits only
    steps, wanted = rules.insert_rounding(rules.gather_products([wkv, p.AddLinear(value(), wkv.out, by_columns)]))
    assert [type(step) for step in steps] == [p.Wkv6, RoundFactors, Int8Products]
    assert not wanted


def test_each_factor_of_a_linear_is_rounded_once_and_all_in_one_launch() -> None:
    x, delta, mix = value(), value(), value()
    lerp, part = p.Lerp(x, delta, mix), p.Columns(value(columns=64), 32, 32)
    factors = [lerp, x, lerp, part, x]
    rounded, wanted = rounding(p.Linear(tuple(p.Product(each, int8()) for each in factors)))
    assert rounded == [[lerp, x, part]]
    assert wanted == set()


def test_what_float_matrices_read_is_not_rounded() -> None:
    assert rounding(p.Linear((p.Product(value(), floats()),))) == ([], set())


def test_a_product_with_one_token_puts_its_levels() -> None:
    first = p.Linear((p.Product(value(ONE), int8()), p.Product(value(ONE), int8()), p.Product(value(ONE), floats())))
    a, b, c = first.out
    second = p.Linear((p.Product(a, int8()), p.Product(c, int8()), p.Product(a, int8())))
    rounded, wanted = rounding(first, second)
    assert rounded[1] == [c]  # the kernel of a float product puts none
    assert wanted == {a}  # nobody reads b
    assert b not in wanted


def test_a_product_with_many_tokens_puts_no_levels() -> None:
    (a,) = (first := p.Linear((p.Product(value(MANY), int8()),))).out
    assert rounding(first, p.Linear((p.Product(a, int8()),)))[1] == set()


@pytest.mark.parametrize("rows", [ONE, MANY])
@pytest.mark.parametrize(("head_size", "puts"), [(32, True), (64, True), (16, False), (48, False)])
def test_a_recurrence_with_heads_of_whole_groups_puts_its_levels(rows: p.Count, head_size: int, puts: bool) -> None:
    wkv = wkv6(rows, 2, head_size)
    K = 2 * head_size
    rounded, wanted = rounding(wkv, p.AddLinear(value(rows), wkv.out, int8(32, K)))
    assert rounded == [[] if puts else [wkv.out]]
    assert wanted == ({wkv.out} if puts else set())


def test_a_value_that_is_read_as_a_part_or_a_mix_gets_no_levels() -> None:
    wkv = wkv6(MANY, 2, 32)
    factors = p.Columns(wkv.out, 0, 32), p.Lerp(wkv.out, wkv.out, wkv.out)
    rounded, wanted = rounding(wkv, p.Linear(tuple(p.Product(each, int8()) for each in factors)))
    assert rounded == [list(factors)]
    assert wanted == set()


def test_a_value_that_was_changed_is_rounded_again() -> None:
    for change in (
        lambda x: p.AddGated(x, value(), value()),
        lambda x: p.Gate(x, value()),
        lambda x: p.RoundTo(x, "F16"),
        lambda x: p.AddLinear(x, value(), int8()),
        lambda x: p.AddLinear(x, value(), floats()),
    ):
        wkv = wkv6(MANY, 1, 32)
        before = p.Linear((p.Product(wkv.out, int8()),))
        after = p.Linear((p.Product(wkv.out, int8()),))
        rounded, wanted = rounding(wkv, before, change(wkv.out), after)
        assert rounded[0] == []
        assert rounded[-1] == [wkv.out]
        assert wanted == {wkv.out}
        # read only after the change, its levels are not put at all
        wkv = wkv6(MANY, 1, 32)
        assert rounding(wkv, change(wkv.out), p.Linear((p.Product(wkv.out, int8()),)))[1] == set()


def test_a_layer_of_rwkv_7_with_one_token_is_eight_launches() -> None:
    """The steps of a layer as models/rwkv7.py writes it."""
    x, first = value(ONE), value(ONE)
    attention = p.LayerNorm(x, NORM)
    delta = shift_of(attention.out)
    mixed = [p.Lerp(attention.out, delta.out, NOTHING) for _ in range(4)]
    one = p.Linear(tuple(p.Product(each, int8()) for each in mixed))
    two = p.Linear(tuple(p.Product(each, int8()) for each in one.out[1:]))
    w, a, g = two.out
    wkv = p.Wkv7(
        receptance=first, decay=w, key=first, value=first, rate=a, gate=g, residual=None, key_scale=NOTHING,
        key_rate=NOTHING, bonus=np.zeros((1, 32)), norm=NORM, starts=STARTS,
        state=p.LayerState(p.Input("wkv", (1, 1, 1, 32, 32)), 0),
    )  # fmt: skip
    channel = p.LayerNorm(x, NORM)
    shift = shift_of(channel.out)
    key = p.Linear((p.Product(p.Lerp(channel.out, shift.out, NOTHING), int8(), "relu_squared"),))
    (k,) = key.out
    steps, wanted = rules.steps_of([
        attention, delta, one, two, wkv, p.AddLinear(x, wkv.out, int8()), channel, shift, key,
        p.AddLinear(x, k, replace(int8(), by_columns=True)),
    ])  # fmt: skip
    assert [type(step) for step in steps] == [
        NormShift, Int8Products, Int8Products, p.Wkv7, Int8Products, NormShift, Int8Products, Int8Products,
    ]  # fmt: skip
    assert [[x for x, _ in step.mixes] for step in steps if isinstance(step, NormShift)] == [
        mixed, [each.x for each in key.products]
    ]  # fmt: skip
    assert wanted == dict.fromkeys((*one.out[1:], wkv.out), 15) | {k: 8}


def test_a_norm_and_shift_round_their_own_mixes() -> None:
    norm = p.LayerNorm(value(), NORM)
    shift, vector = shift_of(norm.out), np.zeros(32)
    own = p.Lerp(norm.out, shift.out, vector)
    for factors, joins in (
        ([own, norm.out], True), ([own, value()], False), ([shift.out], False),
        ([p.Lerp(norm.out, value(), vector)], False), ([p.Lerp(value(), shift.out, vector)], False),
        ([p.Lerp(norm.out, shift.out, value())], False), ([p.Columns(norm.out, 0, 32)], False),
    ):  # fmt: skip
        linear = p.Linear(tuple(p.Product(each, int8()) for each in factors))
        steps, _ = rules.steps_of([norm, shift, linear])
        assert [type(step) for step in steps] == [NormShift, *[RoundFactors][joins:], Int8Products]
        first, *_ = steps
        assert isinstance(first, NormShift)
        assert [x for x, _ in first.mixes] == factors * joins
    later = p.Linear((p.Product(own, int8()),))
    steps, _ = rules.steps_of([norm, shift, p.AddGated(value(), value(), value()), later])
    assert [type(step) for step in steps] == [NormShift, p.AddGated, RoundFactors, Int8Products]


SOURCES = Path(rules.__file__).parent / "device"
UPLOADING = {"repack", "repack_codes", "repack_scales"}
"""Kernels that are in no graph."""


def kernels_of(path: Path) -> list[ast.FunctionDef]:
    """The functions of a file that are kernels."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return [each for each in functions if any("id='kernel'" in ast.dump(one) for one in each.decorator_list)]


@pytest.mark.parametrize("path", sorted(SOURCES.glob("*.py")), ids=lambda path: path.stem)
def test_every_kernel_of_a_graph_waits_for_the_one_before(path: Path) -> None:
    """Else it would read what is not written yet: a graph lets it begin while the one before runs."""
    for each in kernels_of(path):
        calls = [getattr(node.func, "id", "") for node in ast.walk(each) if isinstance(node, ast.Call)]
        expected = 0 if each.name in UPLOADING else 1
        assert (calls.count("let_next_begin"), calls.count("wait_for_previous")) == (expected, expected), each.name
