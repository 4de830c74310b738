"""The recurrences by heads on the GPU, `wkv6` and `wkv7`: how a block shares a head of a sequence among its threads.

Rows are those of B sequences, and `starts` is int64 [B + 1]. The states begin `offset` bytes after the address at
`state`. A matrix S [N, N] is [key, value]. It stays in registers while the block goes through the sequence's tokens,
a tile of them at a time. What needs no state is done for all tokens of a tile at once, a warp a token: before, and
after. While one tile's tokens are gone through, the next one is prepared and the one before is finished. So there are
two places in shared memory for everything, and a barrier between tiles.
"""

from typing import Any, NamedTuple

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import MOST_WARPS, Float, Int, cuda, function, sqrt, warp_sums
from rwkv_cli.numbers import GROUP

ROWS, PAIR, LANES = 4, 2, 4
"""A thread has chunks of 4 rows of a state, in 2 columns; 4 neighbouring lanes share these columns."""
SPAN = ROWS * LANES
"""Rows of a round of chunks, and columns of a warp."""
_SHARED = 512
"""Most numbers of a vector in each of its two places in shared memory: those of a tile's tokens."""
_BANKS_APART = 8
"""What keeps parts of sums, that lanes put at the same time, in different banks of shared memory."""


def padded(N: int) -> int:
    """The head size up to whole rounds of chunks. What is beyond N is 0 everywhere."""
    return -(-N // SPAN) * SPAN


def puts_levels(N: int) -> bool:
    """True if heads of size N are whole groups. Their kernel can then put levels."""
    return N % GROUP == 0


class Form(NamedTuple):
    """A form of a kernel. A token's numbers do not depend on it."""

    turns: int
    """Tokens of a warp in a tile, at most."""
    blocks: int
    """Blocks that a multiprocessor should hold, which bounds a thread's registers."""
    puts: bool
    """True if it can put levels."""
    split: bool
    """True if half of the warps prepare and finish tiles while the others go through tokens."""


class Sizes(NamedTuple):
    """The numbers that a kernel for heads of one size is made of."""

    turns: int
    """Tokens of a warp in a tile."""
    padded: int
    warps: int
    """Warps that go through tokens, and as many that prepare and finish tiles: the same ones, or others."""
    helpers: int
    """The first warp of those that prepare and finish."""
    rounds: int
    """Chunks of rows that a thread has."""
    state: int
    """Numbers of the state that a thread has."""
    channels: int
    """Channels that a lane has where a warp has a token."""
    tile: int
    """Tokens of a tile."""
    apart: int
    """How far the parts of a tile's sums are from each other, one of each of the lanes that share columns."""


def sizes_of(N: int, form: Form) -> Sizes:
    """The sizes for heads of size N, which may be 512 at most."""
    whole = padded(N)
    warps = rounds = whole // SPAN
    tile = min(form.turns * warps, _SHARED // whole)
    helpers, turns = warps if form.split and 2 * warps <= MOST_WARPS else 0, -(-tile // warps)
    state, channels, apart = rounds * ROWS * PAIR, -(-whole // 32), tile * whole + _BANKS_APART
    return Sizes(turns, whole, warps, helpers, rounds, state, channels, tile, apart)


def threads(N: int, form: Form) -> int:
    """Threads of a block for heads of size N."""
    sizes = sizes_of(N, form)
    return 32 * (sizes.warps + sizes.helpers)


@function
def channel_of(h: Int, j: Int, lane: Int, N: Int) -> Any:
    """A lane's j-th channel of head h. Beyond the head's end it is the last one. The caller's N is a constant."""
    return h * N + (j * 32 + lane if N % 32 == 0 else min(j * 32 + lane, np.int64(N - 1)))


@function
def added(sums: Any, at: Int, apart: Int) -> Any:
    """A sum of which each of the lanes that share columns has put its part, in the order that these lanes have."""
    a, b = (
        sums[np.uint64(at)] + sums[np.uint64(at + apart)],
        sums[np.uint64(at + 2 * apart)] + sums[np.uint64(at + 3 * apart)],
    )
    return a + b


@function
def place_of(i: Int, first: Int) -> Any:
    """The row and the side of the pair of columns that number `i` of a thread's state has. `first` is its first row."""
    return i // (ROWS * PAIR) * SPAN + first + i // PAIR % ROWS, i % PAIR


@function
def norm_tokens(out: Any, totals: Any, weights: Any, eps: Float, shape: Any) -> None:
    """Norm a warp's tokens by their head. A lane has its channels of each in `out`, and the sum of these in `totals`.

    `weights` are those of the lane's channels, and their biases. `shape` is turns, channels and head size, constants.
    """
    turns, channels, N = shape
    scale, shift = weights
    lane = np.int64(cuda.threadIdx.x) % 32
    warp_sums(totals, turns)
    for turn in range(turns):
        mean, totals[turn] = totals[turn] / np.float32(N), np.float32(0)
        for j in range(channels):
            i = turn * channels + j
            if N % 32 == 0 or j * 32 + lane < N:
                out[i] -= mean
                totals[turn] += out[i] * out[i]
    warp_sums(totals, turns)
    for turn in range(turns):
        inverse = np.float32(1) / sqrt(totals[turn] / np.float32(N) + eps)
        for j in range(channels):
            i = turn * channels + j
            out[i] = out[i] * inverse * scale[j] + shift[j]


class Forms(NamedTuple):
    """The forms for sequences of few tokens and of many."""

    few: Form
    many: Form


def forms(capability: tuple[int, int]) -> Forms:
    """The forms for a GPU. Before Hopper, compilers need more registers for the same kernel."""
    hopper = capability >= (9, 0)
    return Forms(Form(1, 3 if hopper else 2, True, False), Form(2 if hopper else 1, 1, False, True))


FEW_TOKENS = 4
"""Sequences of so many tokens, on average, are of few."""
