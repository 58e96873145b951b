"""Pruning criteria: one file for each, and a table of all."""
