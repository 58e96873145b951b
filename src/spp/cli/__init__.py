"""The command line: the table of commands, their flags, and what they print."""

from spp.cli.start import main

__all__ = ["main"]
