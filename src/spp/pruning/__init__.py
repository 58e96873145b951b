"""Pruning block by block: criteria, calibration, refinement, reconstruction."""
