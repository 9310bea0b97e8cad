"""Experiments as Python files; each docstring says what it needs, how long it takes and what it reaches."""
