"""Parts that several commands and benchmarks share."""
