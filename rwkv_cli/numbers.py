"""Numbers and names that files and kernels must agree on."""

GROUP = 32
"""Neighbouring input columns of a matrix that share one scale."""

FLOAT_DTYPES = ("F32", "BF16", "F16")
"""Float types of stored tensors. Kernels know each by its place in this list."""

MOST_LEVEL = 127 * 256
"""Activations are rounded to integers of at most ± this: about 15 bits, and both bytes of each fit in an int8."""

CURVES = {4: (130.0, 0.1), 5: (400.0, 0.05)}
"""The bend and shift of levels by their bits: u · (bend + u²) for u = −half + shift, …, brought to 127 at most.

Such levels are close near zero, where most weights are. These have the least squared error on trained weights.
"""


def _levels(bits: int) -> tuple[int, ...]:
    half = 1 << (bits - 1)
    codes = range(-half, half)
    if bits not in CURVES:
        return tuple(codes)
    bend, shift = CURVES[bits]
    curve = [u * (bend + u * u) for u in (code + shift for code in codes)]
    return tuple(round(127 * x / -curve[0]) for x in curve)


LEVELS = {bits: _levels(bits) for bits in (4, 5, 6)}
"""The levels that codes stand for, by their bits, in rising order (quant/formats/packed.py)."""
