"""Two helping threads of a conversion: one reads ahead, the other hashes and writes behind."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

Block = NDArray[np.float32]

_WAITING = 3
"""Calls that may wait for the thread behind."""


class Behind:
    """A thread that makes calls in order while its owner goes on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[Any]] = deque()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def do(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a call made soon. Raises what an earlier call has raised."""
        if len(self._waiting) == _WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(function, *arguments))

    def finish(self) -> None:
        """Wait until all calls are made. Raises what one of them has raised."""
        while self._waiting:
            self._waiting.popleft().result()


class Ahead:
    """A thread that reads a block while its owner works on the block before."""

    def __init__(self, reads: Iterator[Callable[[], Block]]) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._reads = reads
        self._next: Future[Block] | None = None

    def __enter__(self) -> "Ahead":
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        read = next(self._reads, None)
        self._next = self._thread.submit(read) if read else None

    def block(self) -> Block:
        """The next block."""
        assert self._next is not None, "more blocks are asked for than there are"
        block = self._next.result()
        self._begin()
        return block
