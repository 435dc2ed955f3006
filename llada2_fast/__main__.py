"""python -m llada2_fast: the command line without its installed script."""

import sys

from .cli import main

sys.exit(main())
