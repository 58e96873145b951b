"""HTML pages about runs and benchmarks."""
