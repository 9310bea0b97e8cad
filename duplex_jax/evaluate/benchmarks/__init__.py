"""Standard benchmarks by log-likelihood, asked in three ways: bare text, turn-based, and in slices."""
