"""Experiments as Python files; each docstring says what the experiment needs, how long it takes and what it reaches."""
