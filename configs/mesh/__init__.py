"""Meshes by name: how many devices carry each axis, on which hardware."""
