"""One module for each format of stored weights."""
