"""Survivors of pruning in 2 to 8 bits: codebooks, scales, rounding to nearest, and error feedback."""
