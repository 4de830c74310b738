"""A checkpoint that is not converted yet, as a model reads a converted one."""

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.errors import FormatError
from rwkv_cli.quant.dtypes import BITS, from_float32
from rwkv_cli.quant.formats import Floats
from rwkv_cli.quant.formats.contract import Shape
from rwkv_cli.quant.source import SourceFile, SourceTensor, contiguous
from rwkv_cli.quant.writer import Contents, Planned


class Unconverted:
    """The contents of a file to write as a `ModelFile`, with the source's own values.

    A matrix that lies in the source as it is multiplied is mapped; any other one is read into memory.
    """

    def __init__(self, contents: Contents) -> None:
        self._metadata = contents.metadata
        self._plan = {planned.name: planned for planned in contents.plan}
        self._maps: dict[SourceFile, mmap.mmap] = {}
        self.path = contents.plan[0].source.path
        self.digest = ""

    def metadata(self, key: str, kind: type, default: Any = None) -> Any:
        """The value under `key`."""
        value = self._metadata.get(key, default)
        assert isinstance(value, kind), key
        return value

    def names(self) -> list[str]:
        """Names of the model's tensors."""
        return list(self._plan)

    def tensor(self, name: str, shape: Shape) -> Floats:
        """The tensor `name` in the source's dtype."""
        planned = self._plan[name]
        assert planned.shape == shape
        dtype = planned.spec.dtype
        if planned.derive is None:
            return Floats("float", dtype, self._bits(planned, planned.source))
        return Floats("float", dtype, np.ascontiguousarray(from_float32(planned.whole(), dtype)))

    def vector(self, name: str, shape: Shape) -> NDArray[np.float32]:
        """The float32 tensor `name`."""
        whole = self._plan[name].whole()
        assert whole.shape == shape
        return whole

    def read_by_row(self, name: str) -> None:
        """Change nothing: other tensors lie around this one."""

    def _bits(self, planned: Planned, source: SourceTensor) -> NDArray[Any]:
        """The bits of a tensor, mapped where they lie in one piece."""
        kind = BITS[source.dtype]
        plain = type(source) is SourceTensor and source.dtype == planned.spec.dtype
        if not (plain and source.strides == contiguous(source.shape) and source.start % kind.itemsize == 0):
            return np.ascontiguousarray(from_float32(planned.whole(), planned.spec.dtype))
        if source.file not in self._maps:
            self._maps[source.file] = mmap.mmap(source.file.file.fileno(), 0, access=mmap.ACCESS_READ)
        count = int(np.prod(source.shape))
        if source.start + count * kind.itemsize > len(self._maps[source.file]):
            raise FormatError(f"{source.path}: was changed or replaced while it was read; try again once it is whole")
        return np.frombuffer(self._maps[source.file], kind, count, source.start).reshape(source.shape)
