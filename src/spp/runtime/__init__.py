"""Devices, processes, memory and progress bars."""
