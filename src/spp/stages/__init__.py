"""The stages of the pipeline, one a file; they exchange folders and JSON manifests only."""
