"""numba's CUDA simulator with greenlets for the threads of a block, which come and go in microseconds.

Between two barriers the threads run one after the other, in an order that is drawn anew each time. So what depends on
who comes first gives wrong numbers.
"""

import random
from types import SimpleNamespace
from typing import Any

import greenlet
import numpy as np
import pytest
from numba.cuda.simulator import kernel, kernelapi

from rwkv_cli.kernels.cuda.device import simulated


class Thread(greenlet.greenlet):
    """A thread of a block, with what the simulator asks of one."""

    def __init__(self, body: Any, block: Any, place: Any) -> None:
        super().__init__(body)
        self.blockIdx, self.threadIdx = block, place

    def syncthreads(self) -> None:
        """Let the others run until they are as far."""
        assert self.parent is not None
        self.parent.switch()


def run_block(manager: Any, grid_point: Any, *args: Any) -> None:
    """Run all threads of a block to their end."""
    order, block = random.Random(0), kernel.Dim3(*grid_point)
    waiting = [Thread(lambda: manager._f(*args), block, kernel.Dim3(*at)) for at in np.ndindex(*manager._block_dim)]
    while waiting:
        order.shuffle(waiting)
        for thread in waiting:
            thread.switch()
        waiting = [thread for thread in waiting if not thread.dead]


def use_greenlets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have simulated kernels run so until the end of a test."""
    monkeypatch.setattr(kernel.BlockManager, "run", run_block)
    for module in (kernelapi, simulated):
        monkeypatch.setattr(module, "threading", SimpleNamespace(current_thread=greenlet.getcurrent))
