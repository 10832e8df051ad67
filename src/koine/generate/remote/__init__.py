"""Generate with an OpenAI-compatible endpoint."""
