"""XᵀX of rows X [T, K], on and above its diagonal: a dense product, or the products of what is not zero."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.contract import Loadable
from rwkv_cli.kernels.cpu.args import F32_1, F32_2, I32_1, I64_2, unpack
from rwkv_cli.kernels.cpu.compile import kernel
from rwkv_cli.kernels.cpu.cores import usable_cores
from rwkv_cli.kernels.cpu.steps import Share, Steps

_SPARSE = 1 / 8
"""The share of X that is not zero up to which products of it alone are faster (docs/speed.md)."""
_PANEL = 512
"""Columns of XᵀX of one dense product, so that there is no second matrix of its size."""
_PART = 64
"""Rows of XᵀX that one thread sums up at a time. They stay in a cache."""


class SparseArgs(NamedTuple):
    """The columns and values of X that are not zero, row by row; begins [T, parts + 1]; total [K, K].

    Columns that are rows of total in part p begin at begins[t, p] for row t of X, which ends at begins[t, parts].
    """

    columns: I32_1
    values: F32_1
    begins: I64_2
    total: F32_2


@kernel(SparseArgs)
def add_sparse(args: int, part: int, parts: int) -> None:
    """total[i, j] += Σ_t X[t, i] · X[t, j] for j ≥ i."""
    a = unpack(args, SparseArgs)
    columns, values = a.columns, a.values
    for t in range(len(a.begins)):
        for i in range(a.begins[t, part], a.begins[t, part + 1]):
            row, value = a.total[columns[i]], values[i]
            for j in range(i, a.begins[t, parts]):
                row[columns[j]] += value * values[j]


def add_products(total: NDArray[np.float32], rows: NDArray[np.float32]) -> None:
    """Add XᵀX of rows [T, K] to what is on and above the diagonal of total [K, K]. What is below is left over."""
    T, K = rows.shape
    if np.count_nonzero(rows) > _SPARSE * rows.size:
        for start in range(0, K, _PANEL):
            panel, above = slice(start, start + _PANEL), slice(start + _PANEL)
            total[above, panel] += rows[:, above].T @ rows[:, panel]
        return
    threads, parts, steps = usable_cores().physical, -(-K // _PART), Steps()
    places = np.flatnonzero(rows != 0)  # many times as fast as of floats
    edges = np.minimum(np.arange(parts + 1) * _PART, K)
    found = SparseArgs(
        columns=(places % K).astype(np.int32),
        values=rows.reshape(-1)[places],
        begins=np.searchsorted(places, np.arange(T)[:, None] * K + edges),
        total=total,
    )
    steps.add(add_sparse, found, Share.fixed(parts))
    steps.finish().run(threads)


KERNELS: list[Loadable] = [add_sparse]
"""The kernels of `add_products`."""
