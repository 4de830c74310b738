"""Weights in the GPU's memory: int8 in the order of tensor-core fragments (docs/cuda.md), floats as they are stored."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_cli.kernels.cuda.device import matmul as cuda_matmul
from rwkv_cli.kernels.cuda.device.elementwise import FLOATS
from rwkv_cli.kernels.cuda.driver import Block, stream, synchronize, upload


class Fragments(NamedTuple):
    """An int8 matrix [N, K] that multiplies."""

    shape: tuple[int, int]
    values: Block
    scales: Block
    strips: int
    groups: int
    unit: float


class Rows(NamedTuple):
    """An int8 matrix [V, K] that is read by row."""

    shape: tuple[int, int]
    values: Block
    scales: Block
    width: int
    """K padded to whole groups."""
    unit: float


class FloatMatrix(NamedTuple):
    shape: tuple[int, int]
    bits: Block
    kind: int
    """Which of FLOATS."""


Weight = Fragments | Rows | FloatMatrix

_REPACK_BLOCKS = 1024


def _uploaded(values: NDArray[Any]) -> Block:
    block = Block(values.nbytes)
    upload(block.address, np.ascontiguousarray(values))
    return block


def int8_weight(
    layout: str, shape: tuple[int, int], values: NDArray[np.int8], scales: NDArray[np.uint16], unit: int
) -> Weight:
    if layout == "rows":
        return Rows(shape, _uploaded(values), _uploaded(scales), values.shape[1], 2.0**unit)
    if layout == "tile":
        strips, groups, width = len(scales), scales.shape[1], 0
    else:
        blocks, groups, width = scales.shape
        strips = blocks * width // 16
    stored, stored_scales = _uploaded(values), _uploaded(scales)
    out = Fragments(shape, Block(values.nbytes), Block(scales.nbytes), strips, groups, 2.0**unit)
    threads = min(cuda_matmul.REPACK_THREADS, 32 * strips)
    for kernel, source, to, wide, words in (
        (cuda_matmul.repack, stored, out.values, width, strips * groups * 128),
        (cuda_matmul.repack_scales, stored_scales, out.scales, width or 16, strips * groups * 16),
    ):
        grid = min(_REPACK_BLOCKS, -(-words // (8 * threads)))
        kernel.dispatcher[grid, threads, stream()](source.address, wide, to.address, strips, groups)
    synchronize()  # before what was stored is freed
    return out


def float_weight(dtype: str, bits: NDArray[Any]) -> Weight:
    return FloatMatrix((bits.shape[0], bits.shape[1]), _uploaded(bits), FLOATS.index(dtype))


def weight_size(weight: Weight) -> tuple[int, int, bool]:
    if isinstance(weight, FloatMatrix):
        return weight.bits.size, weight.shape[0] * weight.shape[1], False
    return weight.values.size + weight.scales.size, weight.values.size, False
