"""Pruning block by block: criteria, calibration, refinement, reconstruction; packing what is left."""
