"""Inner steps written in LLVM IR, where the instructions matter."""
