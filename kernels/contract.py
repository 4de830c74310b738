"""The contract of a device. Each device has a module that is held against `Backend`, and one is chosen at load.

Models hand stored tensors to `weight` and `vector`, write a `Program` over what they get back, and have it compiled.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.program import Array, Factor, Lerp, Product, Program, Value, Weight


def activation_bits(x: Factor, weight_bits: int, by_columns: bool) -> int:
    """The bits to which every device rounds a factor for a matrix of int8 or codes: 8 or 15.

    8 where that adds little to what the rounding of the weights costs: behind relu², whose matrix is stored by columns,
    and for mixes of what a layer norm has brought to one size, with codes of 4 bits (docs/quantization.md). Else 15.
    """
    return 8 if by_columns or (weight_bits == 4 and isinstance(x, Lerp)) else 15


class StoredMatrix(Protocol):
    """A matrix [N, K] as a converted file holds it (docs/format.md). `format` says which further fields there are."""

    @property
    def format(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class StoredInt8(StoredMatrix, Protocol):
    """Format "int8": values and scales in one of its layouts."""

    @property
    def layout(self) -> str: ...

    @property
    def values(self) -> NDArray[np.int8]: ...

    @property
    def scales(self) -> NDArray[np.uint16]:
        """Bits of float16."""

    @property
    def unit(self) -> int:
        """A power of two that all scales are multiplied by."""


class StoredPacked(StoredMatrix, Protocol):
    """Formats "q4", "q5" and "q6": codes of so many bits in one of their layouts."""

    @property
    def layout(self) -> str: ...

    @property
    def bits(self) -> int: ...

    @property
    def values(self) -> NDArray[np.uint8]: ...

    @property
    def scales(self) -> NDArray[np.int8]: ...

    @property
    def rows(self) -> NDArray[np.float32]:
        """A factor of each row."""


class StoredFloats(StoredMatrix, Protocol):
    """Format "float": the bits of F32, F16 or BF16 numbers."""

    @property
    def dtype(self) -> str: ...

    @property
    def bits(self) -> NDArray[Any]: ...


Watch = Callable[[float], object]
"""A function that is called while something runs, with the share of it that is done, from 0 to 1."""


class Executable(Protocol):
    """A program, compiled for a device. One thread at a time may run it."""

    def run(self, arrays: Mapping[str, Array], watch: Watch | None = None) -> None:
        """Run the program on an array for each of its inputs, by name.

        Each must have the shape and type that the input says. State arrays are the device's own and are changed.

        A device on which a run can take long calls `watch` several times a second with the share that is done. What it
        raises ends the run, as Ctrl-C does then. State arrays and outputs are undefined afterwards.
        """

    def read(self, value: Value) -> NDArray[Any]:
        """The rows of an output that the last run computed, as a numpy array of the caller's own."""


class Loadable(Protocol):
    """A kernel."""

    def load(self) -> None:
        """Compile it, or read it from the cache."""


class Backend(Protocol):
    """A device."""

    name: str

    keeps_states: bool
    """True if a program can keep the states between its rows (`LayerState.kept`)."""

    chunk: int
    """Rows that a program takes at most. More tokens of a text are several runs."""

    def weight(self, stored: StoredMatrix) -> Weight:
        """Put a matrix that the caller has checked where kernels can read it."""

    def vector(self, values: NDArray[np.float32]) -> Array:
        """Put a small float tensor where kernels can read it."""

    def device_array(self, values: Array) -> Array:
        """A float32 array where programs can read and change it. One that is there already is returned as it is.

        np.asarray copies it back.
        """

    def compile(self, program: Program, threads: int) -> Executable:
        """Lower a program to kernels."""

    def kernels(self, program: Program, threads: int) -> Sequence[Loadable]:
        """The kernels that `compile` would load for a program. There are none where the first run loads them."""

    def limit_kernels(self) -> Sequence[Loadable]:
        """The kernels that `read_bandwidth` and `product_peak` would load."""

    def describe(self) -> str:
        """The device in a few words."""

    def read_bandwidth(self, threads: int, rounds: int = 5) -> float:
        """Bytes a second that its memory gives at most, measured. On a GPU this counts what a copy reads and writes."""

    def product_peak(self, threads: int, rounds: int = 5) -> float | None:
        """Products of an int8 weight and an activation of 15 bits a second that it does at most, measured; None where
        that is not known."""

    def work(self, product: Product) -> float:
        """The multiply-adds of a product with one row, in units of `product_peak`."""
