"""One client of OpenAI-compatible servers, with its cache of replies."""
