"""LLaDA2 diffusion language models, fast and with the right tokens."""

__version__ = "0.1.0"
