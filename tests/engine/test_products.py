"""The products of what matrices read, which calibration sums up."""

import tracemalloc

import numpy as np

from rwkv_cli.engine.calibration import Products
from rwkv_cli.kernels.cpu.feedback import Feedback


def test_products_are_summed_up_without_a_second_matrix_of_their_size() -> None:
    columns = 1100
    rows = np.random.default_rng(0).standard_normal((1200, columns)).astype(np.float32)
    size = 4 * columns * columns
    products = Products()
    tracemalloc.start()
    for start in range(0, len(rows), 240):
        products.add(["ffn.value.weight"], rows[start : start + 240])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2.8 * size, "the sum, one panel of it and the rows, which are as large"
    found, want = products.feedback("ffn.value.weight"), Feedback(rows.T @ rows)
    np.testing.assert_allclose(found.weight, want.weight, rtol=1e-3)
    np.testing.assert_allclose(np.triu(found.carry, 1), np.triu(want.carry, 1), atol=1e-3)
