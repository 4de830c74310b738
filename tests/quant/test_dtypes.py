"""Numbers as the bits of a dtype."""

import numpy as np
import pytest

from rwkv_cli.quant.dtypes import nearest, to_float32


@pytest.mark.parametrize(("dtype", "half_a_step"), [("F32", 0), ("F16", 2**-11), ("BF16", 2**-8)])
def test_the_nearest_numbers_of_a_dtype(dtype: str, half_a_step: float) -> None:
    values = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    off = to_float32(nearest(values, dtype), dtype) / values - 1
    assert np.abs(off).max() <= half_a_step * 1.01
    assert abs(off.mean()) <= half_a_step / 20  # truncation would be half a step off
    exact = to_float32(nearest(values, dtype), dtype)
    np.testing.assert_array_equal(to_float32(nearest(exact, dtype), dtype), exact)
