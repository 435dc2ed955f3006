"""The command line: llada2-fast."""

from .commands import main

__all__ = ["main"]
