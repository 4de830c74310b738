"""What a device must offer: one module for each, held against this Protocol, picked once at load.

Arrays are the device's own; x, y and every other activation is float32 [T, D], a row a token. A function that returns
an array leaves its inputs as they are, one that returns None changes its first argument or the state.

The rows may be those of several sequences, one after the other, each of any length but 0. Only what looks back in time
has to know: it is given `starts` [B + 1], where sequence b has rows starts[b] to starts[b + 1] − 1 (so starts[0] is 0
and starts[B] is T), and the states of all B in one array, which it advances in place. A sequence's numbers are the same
bits whatever is beside it.
"""

from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Activation = Literal["", "sigmoid", "silu", "tanh", "relu_squared"]
Array = NDArray[np.float32]
Starts = NDArray[np.int64]
"""Where each of B sequences has its rows, [B + 1] (see above); in the host's memory."""
Weight = Any
"""A matrix as the device keeps it, made by `int8_weight` or `float_weight`; models never look inside."""


class DeviceError(ValueError):
    """A device or a number of threads that this machine does not have."""


class Backend(Protocol):
    def int8_weight(
        self,
        layout: str,
        shape: tuple[int, int],
        values: NDArray[np.int8],
        scales: NDArray[np.uint16],
        unit: int,
    ) -> Weight:
        """A stored int8 matrix [N, K] (docs/format.md), checked by the caller."""

    def float_weight(self, dtype: str, bits: NDArray[Any]) -> Weight:
        """A stored float matrix [N, K] as the bits of F32, F16 or BF16."""

    def weight_size(self, weight: Weight) -> tuple[int, int, bool]:
        """Its bytes, its elements, and whether `linear` of one token skips what a zero in x would multiply."""

    def vector(self, values: Array) -> Array:
        """A small float tensor, put where the kernels can read it."""

    def embed(self, ids: NDArray[np.int64], table: Weight) -> Array:
        """Rows `ids` [T] of a table [V, D]."""

    def linear(self, x: Array, weight: Weight, activation: Activation = "") -> Array:
        """activation(x · weightᵀ): [T, K] → [T, N]."""

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """Layer norm of each row; weight and bias [D]."""

    def take(self, x: Array, rows: NDArray[np.int64]) -> Array:
        """Those rows of x."""

    def token_shift(self, x: Array, starts: Starts, last: Array) -> Array:
        """x[t−1] − x[t]; before a sequence's first row is its row of `last` [B, D], which is then set to its last."""

    def lerp(self, x: Array, delta: Array, mix: Array) -> Array:
        """x + delta · mix; mix [1, D] or [T, D]."""

    def round_to(self, x: Array, dtype: str) -> None:
        """x to the nearest F32, F16 or BF16, ties to even."""

    def add(self, x: Array, y: Array) -> None:
        """x += y; y [T, D] or [1, D]."""

    def multiply(self, x: Array, y: Array) -> None:
        """x *= y."""

    def split(self, x: Array, parts: int) -> list[Array]:
        """`parts` equal ranges of columns."""

    def decay(self, x: Array) -> None:
        """x = exp(−exp(x))."""

    def group_norm(self, x: Array, weight: Array, bias: Array, heads: int, eps: float) -> None:
        """Layer norm of each of `heads` parts of each row."""

    def wkv4(self, k: Array, v: Array, w: Array, u: Array, starts: Starts, state: Array) -> Array:
        """RWKV-4's average; w, u [D], state [B, 3, D]."""

    def wkv6(self, r: Array, k: Array, v: Array, w: Array, u: Array, starts: Starts, state: Array) -> Array:
        """RWKV-5's and 6's recurrence; w [T, D] or [1, D], u [H, N], state [B, H, N, N] as [key, value]."""

    def delta_terms(self, k: Array, w: Array, a: Array, k_k: Array, k_a: Array, heads: int) -> tuple[Array, Array]:
        """RWKV-7's κ and β; turns k and w into what `wkv7` takes."""

    def blend(self, v: Array, first: Array, gate: Array) -> None:
        """v += (first − v) · σ(gate)."""

    def wkv7(
        self, r: Array, w: Array, k: Array, v: Array, kappa: Array, beta: Array, starts: Starts, state: Array
    ) -> Array:
        """RWKV-7's recurrence; state [B, H, N, N] as [value, key]."""

    def bonus(self, y: Array, r: Array, k: Array, v: Array, r_k: Array) -> None:
        """y += (Σ_head r∘k∘r_k) · v; r_k [H, N]."""

    def cross_entropy(self, logits: Array, targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """−log p(target) of each row, in nats."""

    def divergence(self, p: Array, q: Array) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """KL(p ‖ q) of each row, in nats, and whether both rows have the same maximum."""


def pick(device: str) -> Backend:
    """The module for `device`: "cpu", or "auto" for the best there is. Raises DeviceError for any other."""
    if device not in ("cpu", "auto"):
        raise DeviceError(f"device {device} is not supported yet: use --device cpu")
    from rwkv_cli.kernels import cpu

    return cpu
