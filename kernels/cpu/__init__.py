"""The CPU as a device: numba kernels, run by a team of threads."""
