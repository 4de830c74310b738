"""The contract of every device for weights: products and embeddings of each format against its NumPy reader."""

from dataclasses import replace

import numpy as np
import pytest
from lab import (
    ALL_SIZES,
    RNG,
    Cases,
    Lab,
    cases,
    check,
    each_device,
    in_float16,
    linear,
    normal,
    outliers,
    quantize,
    read_as,
    with_each,
)
from naive import error_ratio, sigmoid

from rwkv_cli.kernels.program import AddLinear, Columns, Embed, Lerp, Product
from rwkv_cli.quant.dtypes import to_float32
from rwkv_cli.quant.formats import Floats

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:RuntimeWarning:rwkv_cli.kernels.cuda"),
    pytest.mark.usefixtures("lone_memory"),
]


SHAPES: Cases = [
    (1, 5, 7), (2, 16, 32), (7, 40, 70), (13, 300, 192), (1, 96, 512), (6, 33, 64), (25, 17, 100), (1, 512, 96),
]  # fmt: skip
# numbers of tokens that a GPU has kernels of their own for, ragged blocks, and several rounds of a warp for one token
GPU_SHAPES: Cases = [*((T, 210, 300) for T in (9, 33, 65, 130, 252)), (1, 19, 2240)] * ALL_SIZES
FEW_SHAPES: Cases = [(1, 5, 7), (2, 33, 70)]
INT8, BITS = ("tile", "columns"), (4, 5, 6)
LAYOUTS = (*INT8, *(f"{layout}{bits}" for bits in BITS for layout in INT8))


@cases(
    "T, N, K, layout, room",
    with_each(with_each(SHAPES, *LAYOUTS), 0, 9),
    [
        *with_each(with_each(FEW_SHAPES, *INT8), 0),
        *with_each(with_each(GPU_SHAPES, *LAYOUTS), 0),
        *((2, 33, 70, layout, 0) for layout in ("columns4", "columns5", "tile6")),
        (1, 256, 33, "columns6", 0),
        *((3, 512, 33, layout, 0) for layout in ("columns", "columns4", "columns6")),
        (2, 5, 7, "tile", 9),
        (66, 20, 40, "tile", 0),
        (66, 5, 40, "columns5", 0),
        (66, 33, 70, "tile4", 0),
    ],
)
def test_quantized_linear(device: str, T: int, N: int, K: int, layout: str, room: int) -> None:
    """Beside the weights' own rounding only the activations' bits remain, outlier or not."""
    stored = quantize(normal(N, K, scale=0.1), layout)
    x = outliers(T, K)
    x[:, 1::3] = 0
    got = linear(x, stored, device=device, room=room)
    w = stored.float32().astype(float)
    in_halves = device == "cuda" and T > 64
    assert error_ratio(got, x @ w.T) < (1e-3 if in_halves else 2e-2 if layout.startswith("columns") else 1e-4)
    # of numbers that are rounded just so, the sums are exact
    check(got, in_float16(x, stored) if in_halves else read_as(x, stored) @ w.T, 1e-5)


PLACES: Cases = with_each(with_each([(40, 70), (48, 64)], *INT8), True, False) + [
    (N, 70, f"{layout}{bits}", False) for N, bits in ((40, 4), (128, 5), (130, 6)) for layout in INT8
]


@cases(
    "N, K, layout, floats, T", with_each(PLACES, 1, 7, 14), [(9, 40, "tile", True, 2), (17, 34, "columns", False, 3)]
)
def test_what_a_product_reads_and_adds_to(device: str, N: int, K: int, layout: str, floats: bool, T: int) -> None:
    """Several at once, of mixes or of ranges of columns, with bias and activation, and onto what is there."""
    stored = quantize(normal(N, K, scale=0.1), layout)
    w = stored.float32().astype(float)
    x, delta, bias = normal(T, K), normal(T, K), normal(1, N)
    for mix in (normal(1, K), normal(T, K)):
        lab = Lab(device)
        weight = lab.weight(stored.float32() if floats else stored)
        wide, shared, offset = normal(T, 2 * K), len(mix) == 1, lab.vector(bias)
        mixed = Lerp(lab.matrix(x), lab.matrix(delta), lab.vector(mix) if shared else lab.matrix(mix))
        both = lab.matrix(wide)
        outs = lab.ops.linear(
            Product(mixed, weight, "sigmoid", offset),
            Product(Columns(both, K, K), weight, bias=offset),
            Product(mixed, weight),
            Product(Columns(both, 0, K), weight, "relu_squared"),
        )
        lerped, first, second = x.astype(float) + delta.astype(float) * mix, wide[:, :K], wide[:, K:]
        if not floats:
            lerped = read_as(lerped, stored, mixed=True)
            first, second = read_as(first, stored), read_as(second, stored)
        want = [sigmoid(lerped @ w.T + bias), second @ w.T + bias, lerped @ w.T, np.maximum(first @ w.T, 0) ** 2]
        for got, right in zip(lab.run(*outs), want, strict=True):
            check(got, right, 1e-5)
    lab, onto = Lab(device), normal(T, N)
    total = lab.value(onto)
    lab.ops.add(AddLinear(total, lab.matrix(x), lab.weight(stored.float32() if floats else stored)))
    added = x.astype(float) if floats else read_as(x, stored)
    check(lab.run(total), onto + added @ w.T, 1e-5)


@cases(
    "layout, T, N, K",
    [(layout, T, N, 200) for layout in LAYOUTS for T, N in ((19, 80), (2, 256), (3, 80), (5, 16), (8, 80), (9, 150))],
    [("tile", 3, 17, 70), ("tile4", 3, 17, 70)],
)
def test_one_token_or_many_are_the_same_numbers(device: str, layout: str, T: int, N: int, K: int) -> None:
    """One token alone gets the numbers that it gets among others. On the CPU they are the same bits."""
    stored = quantize(normal(N, K, scale=0.1), layout)
    x = outliers(T, K)
    x[x < 0] = 0
    x[:, 32:64] = 0
    whole = linear(x, stored, device=device)
    single = np.concatenate([linear(x[t : t + 1], stored, device=device) for t in range(T)])
    (np.testing.assert_array_equal if device == "cpu" else check)(whole, single)


CODES = [layout for layout in LAYOUTS if layout not in INT8]


@cases("layout, T", with_each([(layout,) for layout in CODES], 1, 3), [("tile4", 1), ("tile5", 1), ("columns6", 1)])
def test_any_code_and_scale(device: str, layout: str, T: int) -> None:
    """Every code in every place of a group, with scales of both signs up to their ends."""
    stored = quantize(normal(128, 128), layout)
    values, scales = RNG.integers(0, 256, stored.values.shape), RNG.integers(-127, 128, stored.scales.shape)
    stored = replace(stored, values=values.astype(np.uint8), scales=scales.astype(np.int8))
    x = normal(T, 128)
    check(linear(x, stored, device=device), read_as(x, stored) @ stored.float32().astype(float).T, 1e-5)


BAD = (np.nan, np.inf, -np.inf)


@cases(
    "layout, bad, T, activation",
    [
        *with_each(with_each([(layout, bad) for layout in INT8 for bad in BAD], 1, 8), "", "silu"),
        *[(f"{layout}{bits}", np.inf, T, "silu") for layout in INT8 for bits in BITS for T in (1, 8)],
    ],
    [
        ("tile", np.nan, 1, "relu_squared"),
        ("tile", np.inf, 2, "relu_squared"),
        ("tile", np.inf, 1, ""),
        ("tile", np.nan, 2, "relu_squared"),
        ("columns", -np.inf, 1, ""),
        ("columns", -np.inf, 2, ""),
        ("tile4", np.inf, 1, ""),
        ("tile5", np.nan, 2, ""),
        ("tile", np.nan, 65, ""),
        ("tile4", -np.inf, 65, ""),
    ],
)
def test_what_is_not_finite_reaches_every_output(device: str, layout: str, bad: float, T: int, activation: str) -> None:
    x = np.zeros((T, 64), np.float32)
    x[0, 40] = bad
    got = linear(x, quantize(normal(48, 64), layout), activation, device=device)
    assert np.isnan(got[0]).all()
    assert (got[1:] == 0).all()


@cases("scale, T", with_each([(1e-30,), (1e-7,), (1.0,), (1e6,)], 2, 65), with_each([(1e-30,), (1e6,)], 2, 65))
def test_weights_of_any_size(device: str, scale: float, T: int) -> None:
    w = normal(16, 64, scale=scale)
    w[3] = 0
    w[5, :40] *= 1e-6
    w[6] *= 1e-7 if scale > 1e-20 else 1  # float32 goes no further down
    stored = quantize(w)
    x = normal(T, 64)
    got, want = linear(x, stored, device=device) / scale, x @ (stored.float32().astype(float).T / scale)
    limit = 1e-3 if device == "cuda" and T > 64 else 1e-4
    assert error_ratio(got, want) < limit
    least = np.linalg.norm(x, axis=1) * np.linalg.norm(stored.float32()[6].astype(float) / scale)
    assert (np.abs(got - want)[:, 6] < limit * least).all()


@cases("T, N, K, dtype", with_each(SHAPES, "F32", "F16", "BF16"), with_each([(2, 5, 19)], "F32", "F16", "BF16"))
def test_float_linear(device: str, T: int, N: int, K: int, dtype: str) -> None:
    w, x = normal(N, K, scale=0.1), normal(T, K)
    bits = {"F32": w, "F16": w.astype(np.float16).view(np.uint16), "BF16": (w.view(np.uint32) >> 16).astype(np.uint16)}
    stored = Floats("float", dtype, bits[dtype])
    check(linear(x, stored, "tanh", device=device), np.tanh(x @ stored.float32().astype(float).T), 5e-6)
    lab, ids = Lab(device), np.array([N - 1, 0, 0])
    table = lab.run(lab.ops.add(Embed(lab.ids(ids), lab.weight(stored))))
    np.testing.assert_array_equal(table, to_float32(bits[dtype], dtype)[ids])


@each_device
def test_float16_subnormals(device: str) -> None:
    bits = np.array([[0x0001, 0x83FF, 0x0000, 0x8000, 0x0400]], np.uint16)
    got = linear(np.eye(5, dtype=np.float32) * 2**20, Floats("float", "F16", bits), device=device)
    np.testing.assert_array_equal(got[:, 0], bits.view(np.float16)[0].astype(np.float32) * 2**20)


TABLES: Cases = [("rows",), *((f"rows{bits}",) for bits in BITS)]


@cases("layout", TABLES, TABLES)
def test_quantized_embedding(device: str, layout: str) -> None:
    stored, ids, lab = quantize(normal(9, 50), layout), np.array([8, 0, 3]), Lab(device)
    table = lab.run(lab.ops.add(Embed(lab.ids(ids), lab.weight(stored))))
    np.testing.assert_array_equal(table, stored.float32()[ids])
