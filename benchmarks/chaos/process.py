"""The servers that the gates look at."""

import sys

from ..own_server import SERVE, ServerProcess
from ..soak import SMALL_CACHES

LAUNCHER = (sys.executable, "-m", "llada2_fast.benchmarks.chaos.launcher")
# What glibc keeps for a thread comes and goes by tens of MB. One thread: what the command line chooses for this model,
# and what the expected answers are computed with.
VARIABLES = SMALL_CACHES | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


def started(*options, command=SERVE, port: int = 0) -> ServerProcess:
    """A server whose memory can be compared and whose answers are those of one thread."""
    return ServerProcess(*options, command=command, port=port, variables=VARIABLES)
