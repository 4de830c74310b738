"""Numbers and names that stored weights and kernels must agree on."""

GROUP = 32
"""Neighbouring input columns of a quantized weight that share one scale."""

FLOAT_DTYPES = ("F32", "BF16", "F16")
"""Names of the float dtypes that a file may hold and kernels read, as safetensors spells them."""
