"""An interpreter of PTX in NumPy that checks while it runs: `parse` reads, `machine` executes, `memory` checks."""
