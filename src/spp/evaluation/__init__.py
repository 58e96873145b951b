"""Perplexity, task scores and text generation, for models with or without adapters."""
