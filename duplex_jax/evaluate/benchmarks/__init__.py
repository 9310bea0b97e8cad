"""Standard benchmarks by log-likelihood (plain text, turn-based or slices) and by generation."""
