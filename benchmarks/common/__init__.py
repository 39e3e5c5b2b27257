"""What all benchmarks share: rows of results, the scans and their splits, and work on labels."""
