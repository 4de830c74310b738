"""Programs: kernels recorded once, then run by a team of threads any number of times.

A step is a kernel with its arguments and a number of parts. Each thread takes parts of the step until none is left,
then goes on to the next step or, where one needs what came before, waits for the others at a barrier. That is 0.1 µs,
where a parallel region of OpenMP takes some microseconds and a call from Python as much again: a token costs what its
kernels cost.

Waiting threads spin for some microseconds, since a step is as short; at a barrier they then give way to whoever wants
the core, between programs they sleep. Threads are made once and never end; they hold no Python object.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numba import carray, njit  # type: ignore[attr-defined]
from numpy.typing import NDArray

from rwkv_cli.kernels.cpu.args import pack
from rwkv_cli.kernels.cpu.compile import Kernel, cached, function
from rwkv_cli.kernels.cpu.llvm import atomic

# a team's shared memory, in int64; what different threads write lies on lines of its own
_GENERATION, _ARRIVED, _PHASE = 0, 16, 32
_STEPS, _ARGS, _COUNTERS, _LENGTH = 48, 49, 50, 51
_THREADS = 64  # from here 16 for each: whether it sleeps, and its lock

_SPINS = 1 << 10
"""Looks at a barrier before giving way, some 20 µs: beside other programs the thread waited for may want this core."""
_IDLE_SPINS = 1 << 13
"""Looks between programs before sleeping."""


@function()
def _barrier(shared, threads):  # type: ignore[no-untyped-def]
    phase = atomic.load(shared + _PHASE * 8)
    if atomic.add(shared + _ARRIVED * 8, 1) == threads - 1:
        atomic.exchange(shared + _ARRIVED * 8, 0)
        atomic.add(shared + _PHASE * 8, 1)
        return
    spins = 0
    while atomic.load(shared + _PHASE * 8) == phase:
        spins += 1
        if spins < _SPINS:
            atomic.pause()
        else:
            atomic.give_way()


@function()
def _work(shared, me, threads):  # type: ignore[no-untyped-def]
    """One thread's share of the program."""
    control = carray(atomic.pointer(shared), _THREADS, np.int64)
    steps = carray(atomic.pointer(control[_STEPS]), (control[_LENGTH], 4), np.int64)
    for s in range(len(steps)):
        counter, part = control[_COUNTERS] + s * 8, me
        while part < steps[s, 2]:
            atomic.call(steps[s, 0], control[_ARGS] + steps[s, 1] * 8, part)
            part = atomic.add(counter, 1)
        if threads > 1 and steps[s, 3]:
            _barrier(shared, threads)


def _member(shared, me, threads):  # type: ignore[no-untyped-def]
    """The life of a thread that waits for programs."""
    control = carray(atomic.pointer(shared), _THREADS + threads * 16, np.int64)
    asleep, lock = shared + (_THREADS + me * 16) * 8, control[_THREADS + me * 16 + 1]
    seen = 0
    while True:
        spins = 0
        while atomic.load(shared) == seen:
            spins += 1
            if spins < _IDLE_SPINS:
                atomic.pause()
                continue
            atomic.exchange(asleep, 1)
            # a program that came just now may have seen this thread awake, or has released the lock
            if atomic.load(shared) == seen or atomic.exchange(asleep, 0) == 0:
                atomic.acquire(lock)
        seen += 1
        _work(shared, me, threads)


def _lead(shared, threads):  # type: ignore[no-untyped-def]
    """Start the program, do the first thread's share, wait for the rest."""
    control = carray(atomic.pointer(shared), _THREADS + threads * 16, np.int64)
    atomic.add(shared, 1)
    for other in range(1, threads):
        if atomic.exchange(shared + (_THREADS + other * 16) * 8, 0) == 1:
            atomic.release(control[_THREADS + other * 16 + 1])
    _work(shared, 0, threads)


@functools.cache
def _compiled() -> tuple[Any, Any]:
    compiled: list[Any] = [
        cached(lambda name=name, f=f: njit(name, nogil=True, error_model="numpy", cache=True)(f))  # type: ignore[misc]
        for name, f in (("void(int64, int64, int64)", _member), ("void(int64, int64)", _lead))
    ]
    return compiled[0], compiled[1]


class Team:
    """So many threads, the caller's among them. One program at a time: others wait."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._turn = threading.Lock()
        member, self._lead = _compiled()
        self._control = np.zeros(_THREADS + threads * 16, np.int64)
        # its threads look at this for as long as the process lives
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._control))
        self._address = self._control.ctypes.data
        allocate = ctypes.pythonapi.PyThread_allocate_lock
        allocate.restype = ctypes.c_void_p
        acquire = ctypes.pythonapi.PyThread_acquire_lock
        acquire.argtypes = [ctypes.c_void_p, ctypes.c_int]
        for me in range(1, threads):
            lock = allocate()
            acquire(lock, 1)
            self._control[_THREADS + me * 16 + 1] = lock
            threading.Thread(target=member, args=(self._address, me, threads), daemon=True).start()

    def run(self, steps: NDArray[np.int64], args: NDArray[np.int64], counters: NDArray[np.int64]) -> None:
        """Steps [n, 4] of kernel address, place in `args`, number of parts and whether a barrier follows; counters [n]
        for its own use."""
        if not len(steps):
            return  # nor any barrier, after which alone the others are done with the one before
        with self._turn:
            counters.fill(self.threads)
            self._control[_STEPS : _LENGTH + 1] = (
                steps.ctypes.data, args.ctypes.data, counters.ctypes.data, len(steps),
            )  # fmt: skip
            self._lead(self._address, self.threads)


@functools.cache
def team(threads: int) -> Team:
    """The team of so many threads."""
    return Team(threads)


if hasattr(os, "register_at_fork"):
    # a child has none of its parent's threads
    os.register_at_fork(after_in_child=team.cache_clear)


class Program:
    """Steps in order. Each sees what those before it have written.

    `inputs` are arrays that each run may replace by others of the same shape and type: an argument that lies inside
    one of them moves with it.
    """

    def __init__(self, inputs: Sequence[NDArray[Any]] = ()) -> None:
        """Raises ValueError for inputs that overlap: which of them an argument lies in would not be known."""
        self._ranges = [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in inputs]
        ordered = sorted(self._ranges)
        if any(end > start for (_, end), (start, _) in pairwise(ordered)):
            raise ValueError("inputs of a program must not overlap")
        self._steps: list[int] = []
        self._args: list[int] = []
        self._moving: list[tuple[int, int, int]] = []
        self._kept: list[Any] = []
        self._arrays: tuple[NDArray[np.int64], ...] | None = None

    def add(
        self, kernel: Kernel, parts: int, *arguments: Any, then: bool = True,
        owned: Callable[[NDArray[Any]], bool] = lambda _: False,
    ) -> None:  # fmt: skip
        """Have `kernel` called for each of `parts` parts, in any order and at the same time.

        With `then`, what is added later sees what this has written; else `barrier` comes later. Arrays are kept alive
        unless they are `owned` elsewhere.
        """
        at = len(self._args)
        slots, arrays = pack(kernel.spec, arguments)
        for slot, address, array in arrays:
            for i, (first, last) in enumerate(self._ranges):
                if first <= address < last:
                    self._moving.append((at + slot, i, address - first))
                    break
            else:
                if not owned(array):
                    self._kept.append(array)
        self._args += slots
        self._steps += (kernel.address, at, parts, int(then))

    def barrier(self) -> None:
        """What is added from here on sees what all before have written."""
        if self._steps:
            self._steps[-1] = 1

    def run(self, threads: int, inputs: Sequence[NDArray[Any]] = ()) -> None:
        """Run the steps, with `inputs` in the places of those that it was recorded with. From one thread at a time."""
        if self._arrays is None:
            self.barrier()
            steps = np.array(self._steps, np.int64).reshape(-1, 4)
            self._arrays = (
                steps, np.array(self._args, np.int64), np.zeros(len(steps), np.int64),
                *(np.array(column, np.int64) for column in np.array(self._moving).reshape(-1, 3).T),
            )  # fmt: skip
        steps, args, counters, slots, which, offsets = self._arrays
        if len(slots):
            args[slots] = np.array([a.ctypes.data for a in inputs], np.int64)[which] + offsets
        team(threads).run(steps, args, counters)
