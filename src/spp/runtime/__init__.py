"""Devices, processes, memory, progress bars, and files that others made."""
