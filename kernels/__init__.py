"""numba kernels: arrays in, arrays out. Nothing here knows a model, a name or a file."""
