"""Duplex language models in JAX: time slices in, time slices out, while both sides talk."""

__version__ = "0.1.0"
