"""Numbers and names that files and kernels must agree on."""

GROUP = 32
"""Neighbouring input columns of a matrix that share one scale."""

FLOAT_DTYPES = ("F32", "BF16", "F16")
"""Float types of stored tensors. Kernels know each by its place in this list."""

MOST_LEVEL = 127 * 256
"""Activations are rounded to integers of at most ± this: about 15 bits, and both bytes of each fit in an int8."""
