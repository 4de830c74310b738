"""The end of a product of int8, codes or floats: bias, activation, and the place of its sums."""

from typing import Any, NamedTuple

from rwkv_cli.kernels.cuda.device.compile import Address, Float, Int, f32, function, i64, put_f32
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
def put_output(fields: Address, total: Float, t: Int, n: Int) -> Any:
    """Put output (t, n) of a product whose `OutputFields` begin at `fields`, and return it."""
    y = total
    bias = i64(fields + OUTPUT.bias)
    if bias != 0:
        y += f32(bias + 4 * n)
    y = activate(y, i64(fields + OUTPUT.activation))
    at = i64(fields + OUTPUT.y) + 4 * (i64(fields + OUTPUT.y_stride) * t + n)
    if i64(fields + OUTPUT.add) != 0:
        y += f32(at)
    put_f32(at, y)
    return y
