"""Text from files, datasets and Python's library, as calibration windows and training examples."""
