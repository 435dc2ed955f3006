"""python -m llada2_fast.cli: the command line without its installed script."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())
