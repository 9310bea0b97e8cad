"""Full-duplex language models in JAX: user and assistant exchange time slices and can speak at the same time."""

__version__ = "0.1.0"
