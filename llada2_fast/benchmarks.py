"""Makes the folder of benchmarks importable, for `llada2-fast bench`. See folders.py."""

from .folders import find

__path__ = find("benchmarks", "harness.py")
