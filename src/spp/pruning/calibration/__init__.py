"""What pruning learns from text: the inputs of each layer, and their statistics."""
