"""Formats of weights, each against the naive reading of docs/format.md, whatever the shape and the blocks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rwkv_cli.commands.convert import command
from rwkv_cli.errors import FormatError
from rwkv_cli.kernels.cpu.quantize_packed import pack_rows
from rwkv_cli.kernels.cpu.quantize_weights import quantize_rows
from rwkv_cli.numbers import FLOAT_DTYPES, GROUP, LEVELS
from rwkv_cli.quant.formats import FORMATS, Floats, Int8, Packed, format_of, int8, layout_for, packed
from rwkv_cli.quant.formats import float as float_
from rwkv_cli.quant.formats.contract import Format, Spec, StoredArray
from rwkv_cli.quant.formats.packed import PackedFormat

KINDS = ("matrix", "sparse", "table", "vector")
few = settings(max_examples=60, deadline=None)
sizes = st.integers(1, 600)


def stored(
    format: Format, w: NDArray[np.float32], spec: Spec, blocks: int, quantizer: Callable[..., Any] = quantize_rows
) -> Any:
    """The matrix written in about so many blocks and read again."""
    facts = format.facts_of(float(np.abs(w).max()))
    together = format.rows_together(spec)
    step = -(-len(w) // (blocks * together)) * together
    encoded = [format.encode(w[n : n + step], spec, facts, quantizer).parts for n in range(0, len(w), step)]
    arrays = [np.concatenate(pieces) for pieces in zip(*encoded, strict=True)]
    parts = format.parts(spec)
    assert [array.shape for array in arrays] == [part.shape for part in parts]
    assert len(parts) == len(format.SUFFIXES)
    assert format.accepts(spec, facts)
    return format.read(
        Spec(spec.layout, spec.shape),
        facts,
        [StoredArray(part.dtype, array) for part, array in zip(parts, arrays, strict=True)],
    )


def at(tensor: Int8, n: int, k: int) -> float:
    """w[n, k] as docs/format.md has it."""
    N, _ = tensor.shape
    S = next((S for S in (256, 128, 64, 32) if N % S == 0), 16)
    value, scale = {
        "rows": lambda: (tensor.values[n, k], tensor.scales[n, k // 32]),
        "tile": lambda: (tensor.values[n // 16, k // 4, n % 16, k % 4], tensor.scales[n // 16, k // 32, n % 16]),
        "columns": lambda: (tensor.values[n // S, k, n % S], tensor.scales[n // S, k // 32, n % S]),
    }[tensor.layout]()
    return float(value) * float(np.uint16(scale).view(np.float16)) * 2.0**tensor.unit


@few
@given(N=sizes, K=sizes, layout=st.sampled_from(sorted(int8.LAYOUTS.values())), blocks=st.integers(1, 4))
def test_int8_is_read_as_the_document_says(N: int, K: int, layout: str, blocks: int) -> None:
    rng = np.random.default_rng(N * 1000 + K)
    w = rng.standard_normal((N, K)).astype(np.float32)
    tensor = stored(int8, w, Spec(layout, (N, K), "F32"), blocks)
    whole = int8.quantize(w, layout, quantize_rows)
    np.testing.assert_array_equal(tensor.values, whole.values)
    np.testing.assert_array_equal(tensor.scales, whole.scales)
    got = tensor.float32()
    assert (got.shape, tensor.format) == ((N, K), "int8")
    for n, k in zip(rng.integers(0, N, 20), rng.integers(0, K, 20), strict=True):
        assert got[n, k] == np.float32(at(tensor, n, k))
    assert np.abs(got - w).max() <= np.abs(w).max() / 100
    # padding is zeros, which products may read
    assert np.count_nonzero(tensor.values) == np.count_nonzero(got)


def packed_at(tensor: Packed, n: int, k: int) -> np.float32:
    """w[n, k] as docs/format.md has it, from single bytes and bits."""
    B, G, c, (N, _) = tensor.bits, k // 32, k % 32, tensor.shape
    W = next((W for W in (512, 256) if N % W == 0), 128)
    unit, piece, i, values, scale, row = {
        "rows": lambda: (4, c // 4, c % 4, tensor.values[n, G], tensor.scales[n, G], tensor.rows[n]),
        "tile": lambda: (
            *(64, c // 4, n % 16 * 4 + c % 4, tensor.values[n // 16, G]),
            *(tensor.scales[n // 16, G, n % 16], tensor.rows[n // 16, n % 16]),
        ),
        "columns": lambda: (
            *(16, n % 128 // 16, n % 16, tensor.values[n // W, k, 16 * B * (n % W // 128) :]),
            *(tensor.scales[n // W, G, n % W], tensor.rows[n // W, n % W]),
        ),
    }[tensor.layout[:-1]]()
    code = int(values[unit * (piece // 2) + i]) >> 4 * (piece % 2) & 15
    if B == 5:
        code += 16 * (int(values[4 * unit + i]) >> piece & 1)
    if B == 6:
        code += 16 * (int(values[4 * unit + unit * (piece // 4) + i]) >> 2 * (piece % 4) & 3)
    return np.float32(LEVELS[B][code]) * (np.float32(scale) * row)


@few
@given(
    N=st.integers(1, 300) | st.sampled_from([256, 384, 512, 768, 1024]),
    K=st.integers(1, 200),
    layout=st.sampled_from(["rows", "tile", "columns"]),
    bits=st.sampled_from([4, 5, 6]),
    blocks=st.integers(1, 4),
)
def test_codes_are_read_as_the_document_says(N: int, K: int, layout: str, bits: int, blocks: int) -> None:
    rng = np.random.default_rng(N * 1000 + K)
    w = rng.standard_normal((N, K)).astype(np.float32) * rng.lognormal(0, 3, (N, 1)).astype(np.float32)
    quantizer = partial(pack_rows, bits=bits)
    format, spec = PackedFormat(bits), Spec(f"{layout}{bits}", (N, K), "F32")
    tensor = stored(format, w, spec, blocks, quantizer)
    whole = packed.quantize(w, spec.layout, quantizer)
    for name in ("values", "scales", "rows"):
        np.testing.assert_array_equal(getattr(tensor, name), getattr(whole, name))
    got = tensor.float32()
    assert (got.shape, tensor.format) == ((N, K), f"q{bits}")
    for n, k in zip(rng.integers(0, N, 20), rng.integers(0, K, 20), strict=True):
        assert got[n, k] == packed_at(tensor, n, k)
    *_, squared_error = quantizer(w)
    of_float32 = 1e-12 * np.square(w, dtype=float).sum()
    assert np.isclose(np.square(got - w, dtype=float).sum(), squared_error, rtol=1e-5, atol=of_float32)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_every_code_of_every_piece_survives_packing(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for unit in (4, 16, 64):
        codes = rng.permuted(np.resize(np.arange(1 << bits, dtype=np.uint8), (40, 8, unit)), axis=0)
        values = packed.pack(codes, bits)
        assert values.shape == (40, unit * bits)
        np.testing.assert_array_equal(packed.unpack(values, bits), codes)
        np.testing.assert_array_equal(packed.pack(packed.unpack(values, bits), bits), values)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_codes_are_as_near_as_a_search_over_all_scales(bits: int) -> None:
    """No weight has a nearer level, and no int8 scale makes a group much better than the one that was found."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((40, 96)).astype(np.float32) * rng.lognormal(0, 1, (40, 1)).astype(np.float32)
    w[3] = 0
    w[4, 32:64] = 0
    codes, scales, rows, _ = pack_rows(w, bits)
    levels, groups = np.array(LEVELS[bits], float), w.reshape(40, 3, 32).astype(float)
    assert list(LEVELS[bits]) == sorted(set(LEVELS[bits]))
    assert 0 < min(abs(level) for level in LEVELS[bits]) + 1 <= 2

    def errors(s: NDArray[Any]) -> NDArray[Any]:
        """The least squared error of each group with these scales."""
        near = np.abs(groups[..., None] - levels * (s * rows[:, None])[..., None, None])
        return np.square(near.min(-1)).sum(-1)

    stored_ = levels[codes.reshape(40, 3, 32)] * (scales * rows[:, None])[..., None]
    got = np.square(groups - stored_).sum(-1)
    np.testing.assert_allclose(got, errors(scales.astype(float)), rtol=1e-3, atol=1e-9)
    best = np.min([errors(np.full((40, 3), float(s))) for s in range(-127, 128)], axis=0)
    assert got.sum() <= {4: 1.012, 5: 1.022, 6: 1.008}[bits] * best.sum()
    assert (stored_[3] == 0).all()
    assert (stored_[4, 1] == 0).all()


def test_int8_is_as_near_as_a_search_over_many_scales() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((40, 96)).astype(np.float32) * rng.lognormal(0, 1, (40, 1)).astype(np.float32)
    w[3] = 0
    w[4] *= 1e-14  # no float16 reaches so far below the largest weight
    tensor = int8.quantize(w, "rows", quantize_rows)
    got = np.square(tensor.float32() - w, dtype=float).sum()
    assert np.isclose(quantize_rows(w, tensor.unit)[-1], got, rtol=1e-5)
    assert not tensor.float32()[3:5].any()
    groups = w.reshape(-1, 32)
    scales = np.abs(groups).max(1)[:, None] / np.float32(128)
    errors = []
    for share in np.linspace(1, 1.1, 400):
        scale = np.maximum(scales * share, 1e-30)
        errors.append(np.square(groups - np.clip(np.rint(groups / scale), -128, 127) * scale).sum(1))
    assert got <= 1.07 * np.min(errors, axis=0).sum()


@few
@given(N=sizes, K=st.integers(1, 40), dtype=st.sampled_from(FLOAT_DTYPES), blocks=st.integers(1, 4))
def test_floats_keep_their_bits(N: int, K: int, dtype: str, blocks: int) -> None:
    kind = np.uint32 if dtype == "F32" else np.uint16
    bits = np.random.default_rng(N).integers(0, 1 << (8 * np.dtype(kind).itemsize - 1), (N, K)).astype(kind)
    bits = bits.view(np.float32) if dtype == "F32" else bits
    source = Floats("float", dtype, bits)
    w = source.float32()
    finite = np.where(np.isfinite(w), w, np.float32(-0.0))
    tensor = stored(float_, finite, Spec("float", (N, K), dtype), blocks)
    assert (tensor.dtype, tensor.format, tensor.shape) == (dtype, "float", (N, K))
    assert tensor.float32().tobytes() == finite.tobytes()


def test_a_vector_is_float32_whatever_it_comes_from() -> None:
    w = np.array([[1.5], [-0.0], [2.0**-30]], np.float32)
    for dtype in FLOAT_DTYPES:
        tensor = stored(float_, w, Spec("vector", (3, 1), dtype), 2)
        assert (tensor.dtype, tensor.bits.tobytes()) == ("F32", w.tobytes())


@pytest.mark.parametrize("largest", [0.0, 1e-38, 1e-6, 0.1, 127.0, 128.0, 1e4, 1e10])
def test_the_largest_scale_is_far_from_subnormal(largest: float) -> None:
    facts = int8.facts_of(largest)
    scale = largest / 128 / 2.0 ** facts["unit"]
    assert int8.accepts(Spec("tile", (16, 32)), facts)
    assert largest in (0.0, 1e-38) or 2**14 <= scale < 2**15
    assert scale < 2**15


def test_the_table_is_complete() -> None:
    option = next(option for option in command.params if option.name == "quant")
    assert list(option.type.choices) == list(FORMATS)  # type: ignore[attr-defined]
    assert all(name == format.NAME for name, format in FORMATS.items() if name != "none")
    layouts = [layout for format in FORMATS.values() for layout in set(format.LAYOUTS.values())]
    assert len(layouts) == len(set(layouts))
    assert [layout_for(kind, "int8") for kind in KINDS] == ["tile", "columns", "rows", "vector"]  # type: ignore[arg-type]
    assert [layout_for(kind, "none") for kind in KINDS] == ["float", "float", "float", "vector"]  # type: ignore[arg-type]
    assert all(format_of(layout) is format for format in FORMATS.values() for layout in format.LAYOUTS.values())
    assert [format_of(odd) for odd in (None, "", "tiles", [], {}, 1)] == [None] * 6


@pytest.mark.parametrize("layout", sorted(int8.LAYOUTS.values()))
def test_arrays_of_another_shape_or_dtype_are_refused(layout: str) -> None:
    tensor = int8.quantize(np.ones((40, 70), np.float32), layout, quantize_rows)
    spec, facts = Spec(layout, (40, 70)), {"unit": tensor.unit}
    values, scales = StoredArray("I8", tensor.values), StoredArray("F16", tensor.scales)
    int8.read(spec, facts, [values, scales])
    for damaged in (
        [values._replace(dtype="U8"), scales],
        [values, scales._replace(dtype="BF16")],
        [values._replace(bits=tensor.values[:-1]), scales],
        [values, scales._replace(bits=tensor.scales[:, :-1])],
    ):
        with pytest.raises(FormatError, match=r"^is stored as "):
            int8.read(spec, facts, damaged)
    for unit in (None, 15, -101, 1.0, True, "1"):
        assert not int8.accepts(spec, {"unit": unit})
    assert not int8.accepts(Spec(layout, (40,)), facts)
    assert tensor.scales.size * GROUP == tensor.values.size


@pytest.mark.parametrize("layout", ["rows5", "tile4", "columns6"])
def test_codes_of_another_shape_or_dtype_are_refused(layout: str) -> None:
    format = PackedFormat(int(layout[-1]))
    tensor = packed.quantize(np.ones((40, 70), np.float32), layout, partial(pack_rows, bits=format.bits))
    spec = Spec(layout, (40, 70))
    arrays = [StoredArray("U8", tensor.values), StoredArray("I8", tensor.scales), StoredArray("F32", tensor.rows)]
    format.read(spec, {}, arrays)
    for place, array in enumerate(arrays):
        for bad in (array._replace(dtype="F16"), array._replace(bits=array.bits[:-1])):
            with pytest.raises(FormatError, match=r"^is stored as "):
                format.read(spec, {}, [*arrays[:place], bad, *arrays[place + 1 :]])
    assert not format.accepts(Spec(layout, (40,)), {})
