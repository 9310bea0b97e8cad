"""What `duplex-jax bench` runs: measurements beside named peers (torch, llama.cpp). They are no part of the package."""
