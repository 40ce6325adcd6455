"""Parts that several benchmarks share, and programs that they start and measure."""
