"""`python -m benchmarks.gpu`: see suite.py."""

import sys

from .suite import main

if __name__ == "__main__":
    sys.exit(main())
