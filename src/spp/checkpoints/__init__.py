"""Models on disk: read, rewrite, verify, pack, inspect and upload them, without building the model."""
