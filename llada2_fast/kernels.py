"""Makes the folder of kernels importable, one file per op: `from llada2_fast.kernels import refine`. See folders.py."""

from .folders import find

__path__ = find("kernels", "refine.py")
