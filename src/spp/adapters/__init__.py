"""Adapters on disk: ours, those of the published code, and stock PEFT's HiRA, all as module name -> factors."""
