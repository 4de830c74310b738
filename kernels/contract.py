"""What a device must offer: one module for each, held against `Backend`, picked once at load.

A forward pass is recorded once as a program, by calls of a `Recorder`, and then run any number of times: nothing is
computed while it is recorded. Arrays are the device's own; x, y and every other activation is float32 [T, D], a row a
token. A call that returns an array leaves its inputs as they are, one that returns None changes its first argument;
the recurrences change only their state. Matrix states are [key, value].

The rows may be those of several sequences, one after the other, each of any length but 0. Only what looks back in time
has to know: it is given `starts` [B + 1], where sequence b has rows starts[b] to starts[b + 1] − 1 (so starts[0] is 0
and starts[B] is T), and the states of all B in one array, which it advances in place. A sequence's numbers are the same
bits whatever is beside it, and one token's the same as those of many.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Activation = Literal["", "sigmoid", "silu", "tanh", "relu_squared", "decay", "soft_decay"]
"""decay: exp(−exp(x)); soft_decay: RWKV-7's, exp(−e^{−1/2} σ(x))."""
Array = Any
"""An array as the device keeps it: it has a shape, and slices of rows and columns."""
Starts = NDArray[np.int64]
"""Where each of B sequences has its rows, [B + 1] (see above); in the host's memory, the same in every run."""
Weight = Any
"""A matrix as the device keeps it, made by `int8_weight` or `float_weight`; models never look inside."""


class Lerp(NamedTuple):
    """x + delta ∘ mix, which is computed where a product reads it; mix is [1, D] or [T, D]."""

    x: Array
    delta: Array
    mix: Array


class Product(NamedTuple):
    """activation(x · weightᵀ + bias); x [T, K], weight [N, K], bias [1, N]."""

    x: Array | Lerp
    weight: Weight
    activation: Activation = ""
    bias: Array | None = None


class Norm(NamedTuple):
    """Of the parts of a row: weight and bias [D]."""

    weight: Array
    bias: Array
    eps: float


class Recorder(Protocol):
    """A program while it is recorded, and then to be run."""

    def embed(self, ids: Array, table: Weight) -> Array:
        """Rows `ids` [T] of a table [V, D]."""

    def layer_norm(self, x: Array, norm: Norm) -> Array:
        """Layer norm of each row."""

    def round_to(self, x: Array, dtype: str) -> None:
        """x to the nearest F32, F16 or BF16, ties to even."""

    def take(self, x: Array, rows: NDArray[np.int64]) -> Array:
        """Those rows of x."""

    def token_shift(self, x: Array, starts: Starts, last: Array) -> Array:
        """x[t−1] − x[t]; before a sequence's first row is its row of `last` [B, D], which is then set to its last."""

    def linear(self, *products: Product) -> list[Array]:
        """Each product's [T, N]. What several of them read should be the same object."""

    def add_linear(self, x: Array, y: Array, weight: Weight) -> None:
        """x += y · weightᵀ."""

    def add_gated(self, x: Array, y: Array, gate: Array) -> None:
        """x += y ∘ gate."""

    def split(self, x: Array, parts: int) -> list[Array]:
        """`parts` equal ranges of columns."""

    def wkv4(self, r: Array, k: Array, v: Array, w: Array, u: Array, starts: Starts, state: Array) -> Array:
        """r ∘ RWKV-4's average; w, u [D], state [B, 3, D]."""

    def wkv6(
        self, r: Array, k: Array, v: Array, w: Array, u: Array, norm: Norm, gate: Array | None, starts: Starts,
        state: Array,
    ) -> Array:  # fmt: skip
        """RWKV-5's and 6's recurrence, normed by head, ∘ gate; w [T, D] or [1, D], u [H, N], state [B, H, N, N]."""

    def wkv7(
        self, r: Array, w: Array, k: Array, v: Array, a: Array, g: Array, residual: tuple[Array, Array] | None,
        k_k: Array, k_a: Array, r_k: Array, norm: Norm, starts: Starts, state: Array,
    ) -> Array:  # fmt: skip
        """RWKV-7's time mixing between its matrices (arXiv 2503.14456, section 4): all [T, D], w and a decay and rate.

        residual (first, gate): v is v + (first − v) ∘ gate. k_k, k_a [D], r_k [H, N], state [B, H, N, N]. By head:
        κ = k∘k_k / ‖k∘k_k‖ · k ← k∘(1 + (a − 1)∘k_a) · S ← diag(w)·S − (κ∘a)ᵀ·(κ·S) + kᵀv · y = r·S, normed,
        + (Σ r∘k∘r_k) · v, ∘ g.
        """

    def cross_entropy(self, logits: Array, targets: Array) -> Array:
        """−log p(target) of each row, in nats: float64 [T] of logits [T, V] and targets int64 [T]."""

    def divergence(self, p: Array, q: Array) -> tuple[Array, Array]:
        """KL(p ‖ q) of each row, in nats: float64 [T], and whether both rows have the same maximum: bool [T]."""

    def run(self, inputs: Sequence[Array]) -> None:
        """Run the program with `inputs` in the places of those that it was recorded with, alike in shape and type."""

    def read(self, array: Array) -> NDArray[Any]:
        """What the last run left in `array`, as a numpy array of the caller's own."""


class Backend(Protocol):
    __name__: str

    def int8_weight(
        self, layout: str, shape: tuple[int, int], values: NDArray[np.int8], scales: NDArray[np.uint16], unit: int
    ) -> Weight:  # fmt: skip
        """A stored int8 matrix [N, K] (docs/format.md), checked by the caller."""

    def float_weight(self, dtype: str, bits: NDArray[Any]) -> Weight:
        """A stored float matrix [N, K] as the bits of F32, F16 or BF16."""

    def weight_size(self, weight: Weight) -> tuple[int, int, bool]:
        """Its bytes, its elements, and whether a product of one token skips what a zero in x would multiply."""

    def vector(self, values: NDArray[np.float32]) -> Array:
        """A small float tensor, put where the kernels can read it."""

    def describe(self) -> str:
        """What it runs on, in a few words."""

    def read_bandwidth(self, threads: int, rounds: int = 5) -> float:
        """Bytes a second that its memory gives at most, measured; on a GPU what a copy reads and writes."""

    def int8_peak(self, threads: int, rounds: int = 5) -> float | None:
        """int8 multiply-adds a second that it does at most, measured; None where that is not known."""

    def device_array(self, values: Array) -> Array:
        """A float32 array where programs can read and change it; one that is there already as it is. np.asarray copies
        it back."""

    def record(self, inputs: Sequence[Array], threads: int) -> Recorder:
        """A new program. Those of its arrays that are, or lie in, one of `inputs` are replaced in each run: ids and
        targets from the host, and the arrays of a state, which it changes."""
