"""numba's CUDA simulator with greenlets for the threads of a block, which come and go in microseconds.

Between two barriers the threads run one after the other, in an order that is drawn anew each time. So what depends on
who comes first gives wrong numbers. A barrier that some threads of a block, or lanes of a warp, never reach is an
error.
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
        self.waits_for = ""

    def syncthreads(self) -> None:
        """Let the others of the block run until they are as far."""
        self._wait("block")

    def syncwarp(self) -> None:
        """Let the others of the warp run until they are as far."""
        self._wait("warp")

    def _wait(self, whom: str) -> None:
        assert self.parent is not None
        self.waits_for = whom
        self.parent.switch()


def run_block(manager: Any, grid_point: Any, *args: Any) -> None:
    """Run all threads of a block to their end."""
    order, block = random.Random(0), kernel.Dim3(*grid_point)
    threads = [Thread(lambda: manager._f(*args), block, kernel.Dim3(*at)) for at in np.ndindex(*manager._block_dim)]
    warps = [threads[first : first + 32] for first in range(0, len(threads), 32)]
    while threads:
        ready = [warp for warp in warps if all(each.waits_for == "warp" and not each.dead for each in warp)]
        ready += [free for warp in warps if (free := [each for each in warp if not (each.waits_for or each.dead)])]
        if ready:
            chosen = list(order.choice(ready))
            order.shuffle(chosen)
            for thread in chosen:
                thread.switch()
        else:
            assert all(thread.waits_for == "block" for thread in threads), "a barrier that not all threads reach"
            for thread in threads:
                thread.waits_for = ""
        threads = [thread for thread in threads if not thread.dead]


def use_greenlets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have simulated kernels run so until the end of a test."""
    monkeypatch.setattr(kernel.BlockManager, "run", run_block)
    for module in (kernelapi, simulated):
        monkeypatch.setattr(module, "threading", SimpleNamespace(current_thread=greenlet.getcurrent))
