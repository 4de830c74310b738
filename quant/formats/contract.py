"""The contract of a format. Each format is a module of this package that is held against `Format`.

A tensor has a kind, a format has layouts, and a layout says how the numbers of a tensor lie in the arrays of a file.
The file names only the layout, so no two formats have a layout of the same name.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Kind = Literal["matrix", "sparse", "table", "vector"]
"""The use of a tensor. A matrix multiplies a dense input and a sparse one an input that is mostly zero; a table is read
by row; a vector is any other tensor and is never quantized."""

Shape = tuple[int, ...]

Facts = Mapping[str, Any]
"""The metadata that a file holds for one tensor."""


class Spec(NamedTuple):
    """One tensor to be stored or read."""

    layout: str
    shape: Shape
    """The logical shape, [N, K] for a matrix of N outputs and K inputs."""
    dtype: str = ""
    """The float dtype of the source, left out when reading."""


class Part(NamedTuple):
    """One of the arrays that a tensor is stored in."""

    dtype: str
    shape: Shape


class StoredArray(NamedTuple):
    """One array as a file has it."""

    dtype: str
    bits: NDArray[Any]


class Encoded(NamedTuple):
    """Some rows of a tensor as they are stored."""

    parts: Sequence[NDArray[Any]]
    """One array for each of SUFFIXES."""
    squared_error: float
    """Σ (stored − source)² of these rows."""


class Format(Protocol):
    """One way of storing weights. Modules of this package are formats."""

    NAME: str
    """The name of the format, which a default file name ends in."""
    QUANTIZED: bool
    """True if storing loses precision. The largest value is then known before the first row is encoded."""
    LAYOUTS: Mapping[Kind, str]
    """The layout of each kind of tensor that the format takes."""
    SUFFIXES: tuple[str, ...]
    """Endings of a tensor's name, one for each array that it is stored in."""

    def parts(self, spec: Spec) -> list[Part]:
        """The stored arrays of the tensor, in the order of SUFFIXES."""

    def rows_together(self, spec: Spec) -> int:
        """The number of rows that lie interleaved. Rows are encoded in multiples of it, but for the last ones."""

    def facts_of(self, largest: float) -> dict[str, Any]:
        """The metadata that reading needs, from the largest absolute value of the tensor."""

    def encode(self, rows: NDArray[np.float32], spec: Spec, facts: Facts, quantizer: Any) -> Encoded:
        """The stored form of some rows. `quantizer` is the kernel that rounds them, of the format's own signature."""

    def accepts(self, spec: Spec, facts: Facts) -> bool:
        """Return true if a file may describe a tensor by this shape and these facts."""

    def read(self, spec: Spec, facts: Facts, arrays: Sequence[StoredArray]) -> Any:
        """The tensor in these arrays. Raises FormatError, without the tensor's name, where their shapes are wrong."""
