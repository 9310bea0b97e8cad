"""Standard benchmarks: by log-likelihood in three ways (bare text, turn-based, slices), and by generation."""
