"""`python -m benchmarks.tune`: see tuner.py."""

import sys

from .tuner import main

if __name__ == "__main__":
    sys.exit(main())
