"""The HTTP door: an OpenAI-compatible API, metrics and a page."""
