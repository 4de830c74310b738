"""The end of a product of int8, codes or floats: bias, activation, and the place of its sums."""

from typing import Any, NamedTuple

import numpy as np

from rwkv_cli.kernels.cuda.device.compile import Address, Float, Int, cuda, f32, function, i64, put_f32, types
from rwkv_cli.kernels.cuda.device.elementwise import activate


class OutputFields(NamedTuple):
    """Fields of a row of a table, one after the other: y = activation(sum + bias), or y += that."""

    bias: Address
    """0 for none."""
    activation: Int
    add: Int
    y: Address
    y_stride: Int
    N: Int
    """Columns of y."""


OUTPUT = OutputFields(*range(0, 8 * len(OutputFields._fields), 8))
"""The offset of each field, in bytes after the first of them."""


@function
def output_at(fields: Address) -> Any:
    """The `OutputFields` there that `put_output` takes. A compiler would have them read again after each store."""
    bias, activation, add = i64(fields + OUTPUT.bias), i64(fields + OUTPUT.activation), i64(fields + OUTPUT.add)
    return bias, activation, add, i64(fields + OUTPUT.y), i64(fields + OUTPUT.y_stride)


@function
def put_output(output: Any, total: Float, t: Int, n: Int) -> Any:
    """Put output (t, n) of the product of an `output_at`, and return it."""
    bias, activation, add, y, y_stride = output
    if bias != 0:
        total += f32(bias + 4 * n)
    total, at = activate(total, activation), y + 4 * (y_stride * t + n)
    if add != 0:
        total += f32(at)
    put_f32(at, total)
    return total


@function
def put_outputs(output: Any, totals: Any, tokens: Any, n: Int, T: Int) -> None:
    """`put_output` of four tokens, whose loads are under way together. Tokens from T on have no output."""
    bias, activation, add, y, y_stride = output
    before = cuda.local.array(4, types.float32)
    own = f32(bias + 4 * n) if bias != 0 else np.float32(0)
    for i in range(4):
        before[i] = f32(y + 4 * (y_stride * tokens[i] + n)) if add != 0 and tokens[i] < T else np.float32(0)
    for i in range(4):
        total = activate(totals[i] + own, activation) + before[i]
        if tokens[i] < T:
            put_f32(y + 4 * (y_stride * tokens[i] + n), total)
