"""Text from anywhere as calibration windows and training examples."""
