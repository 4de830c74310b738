"""The commands as Click sees them: options in, calls of the engine, tables and JSON out."""
