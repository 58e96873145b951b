"""The machine under the work: devices, processes, memory, progress."""
