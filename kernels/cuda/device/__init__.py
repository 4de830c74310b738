"""The code that runs on the GPU, and in numba's simulator."""
