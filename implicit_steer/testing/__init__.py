"""Named problems, which tests, benchmarks and the demonstration share."""
