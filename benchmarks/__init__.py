"""Benchmarks for `duplex-jax bench`, next to named peers (torch, llama.cpp); not part of the installed package."""
