"""A team of threads that runs lists of steps.

A step is a kernel with its arguments and a number of parts. Each thread takes parts of the step until none is left. It
then goes on to the next step or, where one needs what came before, waits for the others at a barrier. A barrier costs
0.1 µs. A parallel region of OpenMP takes some microseconds, and a call from Python as much again.

Waiting threads spin for some microseconds, since a step is as short. At a barrier they then give way to whoever wants
the core; between runs they sleep. Threads are made once and never end; they hold no Python object.
"""

import ctypes
import functools
import os
import threading
from typing import Any

import numpy as np
from numba import carray, njit  # type: ignore[attr-defined]
from numpy.typing import NDArray

from rwkv_cli.kernels.cpu.compile import cached, function
from rwkv_cli.kernels.cpu.llvm import atomic

KERNEL, ARGUMENTS, PARTS, BARRIER = range(4)
"""Columns of a table of steps: the kernel's address, where its row of arguments begins, how many parts there are, and
whether a barrier follows."""
COLUMNS = 4

# A team's shared memory, in int64. What different threads write lies on cache lines of its own.
_GENERATION, _ARRIVED, _PHASE = 0, 16, 32
_STEPS, _ARGS, _COUNTERS, _LENGTH = 48, 49, 50, 51
_THREADS, _OF_A_THREAD = 64, 16
_ASLEEP, _LOCK = 0, 1  # in a thread's own line

_SPINS = 1 << 10
"""How often a thread looks at a barrier before it gives way, as the thread that it waits for may want its core. This is
about 20 µs."""
_IDLE_SPINS = 1 << 13
"""How often a thread looks for work before it sleeps."""


@function()
def _barrier(shared, threads):
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
def _work(shared, me, threads):
    """Do one thread's share of the steps."""
    control = carray(atomic.pointer(shared), _THREADS, np.int64)
    steps = carray(atomic.pointer(control[_STEPS]), (control[_LENGTH], COLUMNS), np.int64)
    for s in range(len(steps)):
        counter, part, parts = control[_COUNTERS] + s * 8, me, steps[s, PARTS]
        while part < parts:
            atomic.call(steps[s, KERNEL], control[_ARGS] + steps[s, ARGUMENTS] * 8, part, parts)
            part = atomic.add(counter, 1)
        if threads > 1 and steps[s, BARRIER]:
            _barrier(shared, threads)


def _member(shared, me, threads):
    """Wait for work and do it, for as long as the process lives."""
    control = carray(atomic.pointer(shared), _THREADS + threads * _OF_A_THREAD, np.int64)
    mine = _THREADS + me * _OF_A_THREAD
    asleep, lock = shared + (mine + _ASLEEP) * 8, control[mine + _LOCK]
    seen = 0
    while True:
        spins = 0
        while atomic.load(shared) == seen:
            spins += 1
            if spins < _IDLE_SPINS:
                atomic.pause()
                continue
            atomic.exchange(asleep, 1)
            # work that came just now may have met this thread awake, or has released the lock
            if atomic.load(shared) == seen or atomic.exchange(asleep, 0) == 0:
                atomic.acquire(lock)
        seen += 1
        _work(shared, me, threads)


def _lead(shared, threads):
    """Wake the others, do the first thread's share, and return when all is done."""
    control = carray(atomic.pointer(shared), _THREADS + threads * _OF_A_THREAD, np.int64)
    atomic.add(shared, 1)
    for other in range(1, threads):
        at = _THREADS + other * _OF_A_THREAD
        if atomic.exchange(shared + (at + _ASLEEP) * 8, 0) == 1:
            atomic.release(control[at + _LOCK])
    _work(shared, 0, threads)


@functools.cache
def _compiled() -> tuple[Any, Any]:
    compiled: list[Any] = [
        cached(lambda name=name, f=f: njit(name, nogil=True, error_model="numpy", cache=True)(f))  # type: ignore[misc]
        for name, f in (("void(int64, int64, int64)", _member), ("void(int64, int64)", _lead))
    ]
    return compiled[0], compiled[1]


class _Own:
    """The code that every thread of a team runs."""

    def load(self) -> None:
        """Compile it, or read it from the cache."""
        _compiled()


TEAM = _Own()
"""The kernel of teams themselves."""


class Team:
    """So many threads, the caller's among them. They do one run at a time; other callers wait."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._turn = threading.Lock()
        member, self._lead = _compiled()
        self._control = np.zeros(_THREADS + threads * _OF_A_THREAD, np.int64)
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
            self._control[_THREADS + me * _OF_A_THREAD + _LOCK] = lock
            threading.Thread(target=member, args=(self._address, me, threads), daemon=True).start()

    def run(self, steps: NDArray[np.int64], args: NDArray[np.int64], counters: NDArray[np.int64]) -> None:
        """Run a table of steps [n, COLUMNS] on rows of arguments. The last step must have a barrier.

        `counters` [n] is memory for the team's own use.
        """
        if not len(steps):
            return  # a barrier is what tells that the others are done, and there is none
        with self._turn:
            counters.fill(self.threads)
            self._control[_STEPS : _LENGTH + 1] = (
                steps.ctypes.data,
                args.ctypes.data,
                counters.ctypes.data,
                len(steps),
            )
            self._lead(self._address, self.threads)


@functools.cache
def team(threads: int) -> Team:
    """The team of so many threads."""
    return Team(threads)


if hasattr(os, "register_at_fork"):
    # a child has none of its parent's threads
    os.register_at_fork(after_in_child=team.cache_clear)
