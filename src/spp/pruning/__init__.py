"""Pruning: criteria that choose and mend the weights of one matrix, and the engine that walks a model's blocks."""
