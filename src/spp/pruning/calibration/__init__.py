"""Calibration: statistics of each layer's inputs, collected while the blocks run on text."""
