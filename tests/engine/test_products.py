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
    assert most < 2.8 * size, "the sum, one panel of it and the rows, which are as large"
    tracemalloc.reset_peak()
    found = products.feedback("ffn.value.weight")
    now, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1.8 * size, "the sum and panels of it, put in order"
    assert now < 1.2 * size, "the sum has become the factor"
    want = Feedback(rows.T @ rows)
    np.testing.assert_allclose(found.weight, want.weight, rtol=1e-3)
    np.testing.assert_allclose(np.triu(found.carry, 1), np.triu(want.carry, 1), atol=1e-3)


def test_matrices_with_the_same_inputs_are_rounded_alike() -> None:
    products = Products()
    products.add(["att.value.weight", "att.v1"], np.random.default_rng(0).standard_normal((90, 70)).astype(np.float32))
    first, second = products.feedback("att.value.weight"), products.feedback("att.v1")
    np.testing.assert_array_equal(first.carry, second.carry)
    np.testing.assert_array_equal(first.order, second.order)
    assert "att.v1" not in products
