"""Run a model that stays in its files, block by block; hidden states on disk; a killed run goes on"""
