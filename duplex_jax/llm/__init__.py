"""A client of OpenAI-compatible servers that caches their replies."""
