"""An interpreter of PTX in NumPy that checks while it runs: `parse` reads, `machine` executes, and
`launch`, `spaces` and `races` check."""
