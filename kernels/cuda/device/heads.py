"""The recurrences by heads on the GPU, `wkv6` and `wkv7`: how a block shares a head of a sequence among its threads.

Rows are those of B sequences, and `starts` is int64 [B + 1]. The states begin `offset` bytes after the address at
`state`. A matrix S [N, N] is [key, value]. It stays in registers while the block goes through the sequence's tokens,
a tile of them at a time: what needs no state is done for all tokens of the tile at once, a warp a token.
"""

from typing import Any, NamedTuple

from rwkv_cli.kernels.cuda.device.compile import Int, function
from rwkv_cli.numbers import GROUP

ROWS, PAIR, LANES = 4, 2, 4
"""A thread has chunks of 4 rows of a state, in 2 columns; 4 neighbouring lanes share these columns."""
SPAN = ROWS * LANES
"""Rows of a round of chunks, and columns of a warp."""
_SHARED = 1024
"""Numbers of a vector in shared memory: those of a tile's tokens."""


def padded(N: int) -> int:
    """The head size up to whole rounds of chunks. What is beyond N is 0 everywhere."""
    return -(-N // SPAN) * SPAN


def threads(N: int) -> int:
    """Threads of a block for heads of size N, which may be 512 at most."""
    return 32 * padded(N) // SPAN


def puts_levels(N: int) -> bool:
    """True if heads of size N are whole groups. Their kernel can then put levels."""
    return N % GROUP == 0


class Sizes(NamedTuple):
    """The numbers that a kernel for heads of one size is made of."""

    padded: int
    warps: int
    rounds: int
    """Chunks of rows that a thread has."""
    state: int
    """Numbers of the state that a thread has."""
    channels: int
    """Channels that a lane has where a warp has a token."""
    tile: int
    """Tokens that are in shared memory at a time."""


def sizes_of(N: int, turns: int) -> Sizes:
    whole, warps = padded(N), threads(N) // 32
    rounds = whole // SPAN
    return Sizes(whole, warps, rounds, rounds * ROWS * PAIR, -(-whole // 32), min(turns * warps, _SHARED // whole))


@function
def place_of(i: Int, first: Int) -> Any:
    """The row and the side of the pair of columns that number `i` of a thread's state has. `first` is its first row."""
    return i // (ROWS * PAIR) * SPAN + first + i // PAIR % ROWS, i % PAIR


class Form(NamedTuple):
    """A form of a kernel. A token's numbers do not depend on it."""

    turns: int
    """Tokens of a warp in a tile."""
    blocks: int
    """Blocks that a multiprocessor should hold, which bounds a thread's registers."""
    puts: bool
    """True if it can put levels."""


class Forms(NamedTuple):
    """The forms for sequences of few tokens and of many."""

    few: Form
    many: Form


def forms(capability: tuple[int, int]) -> Forms:
    """The forms for a GPU. Before Hopper, compilers need more registers for the same kernel."""
    hopper = capability >= (9, 0)
    return Forms(Form(1, 4 if hopper else 2, True), Form(4 if hopper else 2, 2, False))


FEW_TOKENS = 4
"""Sequences of so many tokens, on average, are of few."""
