"""Calibration: run the blocks on text, and collect statistics of each layer's inputs."""
