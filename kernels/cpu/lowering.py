"""The state of lowering a program: the steps so far, and the place of each value."""

import math
from typing import Any, NamedTuple

import numpy as np

from rwkv_cli.kernels import program as p
from rwkv_cli.kernels.cpu.args import View
from rwkv_cli.kernels.cpu.compile import Kernel
from rwkv_cli.kernels.cpu.steps import Share, Steps
from rwkv_cli.kernels.cpu.weights import FloatWeight
from rwkv_cli.kernels.memory import NUMPY_DTYPES
from rwkv_cli.numbers import FLOAT_DTYPES

PARTS_A_THREAD = 8
"""Parts for each thread, where there is enough work: the last to finish is then not far behind."""


class Lowering:
    """The steps so far, and the place of each value."""

    def __init__(self, threads: int) -> None:
        self.threads, self.steps = threads, Steps()
        self._views: dict[p.Value, View] = {}

    def view(self, x: p.Value | p.Input | p.LayerState | Any) -> Any:
        """The place of a value, an input or a layer's state. An array of the device's own is itself."""
        if isinstance(x, p.Input | p.InputMatrix):
            return View(x, x.shape, NUMPY_DTYPES[x.dtype])
        if isinstance(x, p.LayerState):
            shape = x.array.shape[1:]
            size = int(np.prod([n for n in shape if isinstance(n, int)])) * 4
            return View(x.array, shape, np.dtype(np.float32), x.layer * size)
        return self._views[x] if isinstance(x, p.Value) else x

    def kept(self, state: p.LayerState) -> View | None:
        """The place of a state's part after each row, from its layer on, or None where nothing is kept."""
        if state.kept is None:
            return None
        array = self.view(state.kept)
        return array._replace(offset=state.layer * math.prod(array.shape[2:]) * 4)  # type: ignore[no-any-return]

    def place(self, value: p.Value) -> View:
        """Memory for a value that the next steps compute."""
        self._views[value] = self.steps.empty((value.rows, value.columns), NUMPY_DTYPES[value.dtype])
        return self._views[value]

    def put(self, value: p.Value, view: View) -> None:
        """Say where a value lies that the steps so far compute."""
        self._views[value] = view

    def shared(self, rows: p.Count, columns: int) -> Share:
        """A share for a step whose rows are independent."""
        return Share(rows, columns, 1, PARTS_A_THREAD * self.threads)

    def by_rows(self, kernel: Kernel, arguments: NamedTuple, like: View, barrier: bool = True) -> None:
        """Append a step that shares out the rows of `like`."""
        rows, columns = like.shape
        assert isinstance(rows, p.Count)
        assert isinstance(columns, int)
        self.steps.add(kernel, arguments, self.shared(rows, columns), barrier)


def by_size(weight: FloatWeight) -> tuple[Any, Any, int]:
    """A float weight's bits as 16 and as 32 bits a number, one of them None, and the number of its dtype."""
    dtype = FLOAT_DTYPES.index(weight.dtype)
    return (None, weight.bits.view(np.uint32), dtype) if dtype == 0 else (weight.bits, None, dtype)
