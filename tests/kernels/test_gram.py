"""XᵀX of rows that are mostly zero, and of others."""

from typing import Any

import numpy as np
import pytest

from rwkv_cli.kernels.cpu import gram


def rows_of(T: int, K: int, left: float) -> Any:
    random = np.random.default_rng(0)
    return (random.standard_normal((T, K)) * (random.random((T, K)) < left)).astype(np.float32)


@pytest.mark.parametrize("left", [0, 0.05, 0.1, 0.4, 1])
@pytest.mark.parametrize(("T", "K"), [(1, 32), (90, 64), (50, 200), (30, 1056)])
def test_products_are_added_on_and_above_the_diagonal(T: int, K: int, left: float) -> None:
    rows = rows_of(T, K, left)
    total = np.arange(K * K, dtype=np.float32).reshape(K, K) / K**2
    want = total + rows.astype(float).T @ rows
    gram.add_products(total, rows)
    np.testing.assert_allclose(np.triu(total), np.triu(want), atol=1e-5 * max(1, want.max()))


def test_what_is_not_zero_is_multiplied_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are the same bits with any number of threads, and what is no number reaches all that it should."""
    rows = rows_of(40, 300, 0.1)
    rows[3, 7] = np.nan
    totals = []
    for threads in (1, 2):
        cores = gram.usable_cores()._replace(physical=threads)
        monkeypatch.setattr(gram, "usable_cores", lambda cores=cores: cores)
        totals.append(np.zeros((300, 300), np.float32))
        gram.add_products(totals[-1], rows)
    np.testing.assert_array_equal(*totals)
    with_it = rows[3] != 0
    assert np.isnan(totals[0][7, 8:][with_it[8:]]).all()
    assert np.isfinite(totals[0][8:]).all()
