"""Perplexity, task scores and generated text, of models with or without adapters."""
